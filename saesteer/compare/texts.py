"""Texts that were written to prompts, and how likely the unsteered model finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from saesteer.core.generate import prompt_ids
from saesteer.effects.damage import cross_entropy, logits_of, padded
from saesteer.errors import TextError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_BATCH = 16


@dataclass(frozen=True)
class Text:
    """What a model wrote.

    Attributes:
        prompt: as the problem gives it, not as an arm changed it.
        text: what was written after it. tokens: the same as token ids, none of them special.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]


def cross_entropies(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text]
) -> tuple[Floats, Flags]:
    """Cross-entropy of each text after its prompt, nats a token [n]; which have a token [n].

    0 for a text without one.
    """
    prompts = _prompts(tokenizer, texts)
    found = [-one for one in log_likelihoods(model, prompts, [one.tokens for one in texts])]
    return np.array(found), np.array([bool(one.tokens) for one in texts])


def information(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text]
) -> tuple[Floats, Flags]:
    """(log p(text | prompt) − log p(text)) / tokens of each text, nats [n]; which count [n].

    The pointwise mutual information of prompt and text. A text without a prompt begins with BOS;
    where a tokenizer has none, nothing tells how likely a first token is, and it isn't counted. 0
    for a text without a token to count.
    """
    try:
        nothing = prompt_ids(tokenizer, [""], prepend_bos=True)[0][0]
        skip = 0
    except TextError:  # no BOS
        nothing, skip = [], 1
    prompts = _prompts(tokenizer, texts)
    rest = [one.tokens[skip:] for one in texts]
    after = [[*ids, *one.tokens[:skip]] for ids, one in zip(prompts, texts, strict=True)]
    alone = [[*nothing, *one.tokens[:skip]] for one in texts]
    given, free = (log_likelihoods(model, ids, rest) for ids in (after, alone))
    return np.array(given) - np.array(free), np.array([bool(one) for one in rest])


def log_likelihoods(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[float]:
    """Mean log p of a text's tokens after its context, nats a token; 0 of a text without any.

    contexts, texts: token ids, as many of each; contexts have one token at least.
    """
    found = [0.0] * len(texts)
    # Those of a length together: what is padded is computed for nothing.
    some = [i for i, text in enumerate(texts) if text]
    some.sort(key=lambda i: len(contexts[i]) + len(texts[i]))
    for first in range(0, len(some), _BATCH):
        batch = some[first : first + _BATCH]
        ids, mask = padded([[*contexts[i], *texts[i]] for i in batch])
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = logits_of(model, ids, mask)
        for row, i in enumerate(batch):
            begin, end = len(contexts[i]), len(contexts[i]) + len(texts[i])
            losses = cross_entropy(logits[row, begin - 1 : end - 1], ids[row, begin:end])
            found[i] = -float(losses.to(torch.float64).mean())
    return found


def _prompts(tokenizer: Any, texts: Sequence[Text]) -> list[list[int]]:
    return prompt_ids(tokenizer, [one.prompt for one in texts], prepend_bos=True)[0]
