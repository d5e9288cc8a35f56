"""Texts that a steered model writes, and what the unsteered model reads in them."""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.generate import write
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.core.sae import Sae
from saesteer.effects import readings
from saesteer.effects.damage import cross_entropy, logits_of, padded
from saesteer.effects.readings import Reading
from saesteer.errors import TextError
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens, BOS included; the plain tokens written after it; these as text."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    text: str


def continuations(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Sequence[Edit]],
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seeds: Sequence[int],
) -> list[Continuation]:
    """Continue rows of token ids in one `generate`, each under its own list of edits.

    Rows of one seed draw the same noise. temperature: 0 is greedy.

    Raises:
        TextError: a prompt leaves no room for the new tokens.
        SteeringError: an edit can't be made, or the logits are NaN.
    """
    steered = steer(model, [list(row) for row in edits], tokenizer=tokenizer)
    with steered if any(edits) else nullcontext():
        written = write(
            model, tokenizer, prompts,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seeds,
        )  # fmt: skip
    special = special_token_ids(model, tokenizer)
    return [
        Continuation(one.prompt, tuple(i for i in one.new if i not in special), one.reply)
        for one in written
    ]


def text_ce(
    model: PreTrainedModel, texts: Sequence[Continuation], *, batch_size: int = 16
) -> float | None:
    """CE of the generated tokens under the model as it is, after their prompts: nats a token.

    Call it outside of `steer`. None where no text has a token.
    """
    total, n = 0.0, 0
    for start in range(0, len(texts), batch_size):
        ids, mask, written = _whole(texts[start : start + batch_size], model.device)
        logits = logits_of(model, ids, mask)[:, :-1][written[:, 1:]]
        losses = cross_entropy(logits, ids[:, 1:][written[:, 1:]])
        total += float(losses.cpu().double().sum())
        n += len(losses)
    return total / n if n else None


# What a dose has an effect on: one number for each text.
Effect = Callable[[Sequence[Continuation]], list[float]]


def feature_activation(model: PreTrainedModel, sae: Sae, feature: int) -> Effect:
    """The feature's activation on the text, mean over generated tokens, the model unsteered.

    What is read is the text alone: under the edit itself a clamped feature would read as its
    value, whatever was written. A text without a token counts as 0.
    """

    return _mean_reading(model, readings.of_feature(sae, feature))


def projection(model: PreTrainedModel, vector: Tensor, point: HookPoint) -> Effect:
    """x · v / ‖v‖, mean over generated tokens, the model unsteered; 0 for a text without one."""
    return _mean_reading(model, readings.of_vector(vector, point))


def word_share(words: Sequence[str]) -> Effect:
    """1 for each text that holds one of the words as a whole word, in any case; else 0.

    Raises:
        TextError: no words.
    """
    kept = [re.escape(word.strip()) for word in words if word.strip()]
    if not kept:
        raise TextError("no words to look for; give one at least")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(kept)})(?!\w)", re.IGNORECASE)
    return lambda texts: [float(pattern.search(one.text) is not None) for one in texts]


def _mean_reading(model: PreTrainedModel, reading: Reading, batch_size: int = 16) -> Effect:
    """The mean of a reading over each text's generated tokens."""

    def effect(texts: Sequence[Continuation]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), batch_size):
            ids, mask, written = _whole(texts[start : start + batch_size], model.device)
            x = activations(model, [reading.point], ids, mask)[reading.point]
            value = reading.read(x).to(ids.device)
            total = torch.where(written, value, 0.0).sum(1)
            found += (total / written.sum(1).clamp(min=1)).tolist()
        return found

    return effect


def _whole(texts: Sequence[Continuation], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with what was written, padded on the right; their mask; which were written."""
    ids, mask = (t.to(device) for t in padded([(*one.prompt, *one.new) for one in texts]))
    begins = torch.tensor([[len(one.prompt)] for one in texts], device=device)
    return ids, mask, (torch.arange(ids.shape[1], device=device) >= begins) & (mask == 1)
