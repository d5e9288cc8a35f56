"""Whether a model agrees that a pair's chosen answer is the one that shows a behaviour."""

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.writers import Cost
from saesteer.directions.margin import margins
from saesteer.directions.pair_asking import told
from saesteer.directions.pairs import Pair, as_chat
from saesteer.directions.places import side_tokens

Agreement = Callable[[Sequence[Pair]], Sequence[float]]
"""Pairs → how far a model agrees that the chosen answer is the one that shows the behaviour."""


def agrees(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: str,
    *,
    cost: Cost | None = None,
    batch_size: int = 16,
) -> Agreement:
    """Agreement by a model's own margin, in nats a token.

    m(asked for the behaviour) − m(asked for its opposite), with m = log p(chosen) − log p(rejected)
    a token: above 0 the model itself takes the chosen answer for the one that shows the behaviour.
    What both answers are likely or unlikely by, whatever is asked, falls out of the difference.
    Pairs are put into the tokenizer's chat format where it has one.
    """
    cost = cost or Cost()

    def agreement(pairs: Sequence[Pair]) -> list[float]:
        begin = time.monotonic()
        both = [told(behaviour, pair, opposite=o) for o in (False, True) for pair in pairs]
        if getattr(tokenizer, "chat_template", None):
            both = list(as_chat(both, tokenizer))
        with torch.no_grad():
            m = margins(model, tokenizer, both, batch_size=batch_size)
        for pair in both:
            for answer in (pair.chosen, pair.rejected):
                cost.add(len(side_tokens(tokenizer, pair.prompt, answer).ids), 0)
        cost.seconds += time.monotonic() - begin
        return (m[: len(pairs)] - m[len(pairs) :]).tolist()

    return agreement
