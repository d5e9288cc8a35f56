"""Texts as rows of one batch, and a vector added to their plain tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.model import HookPoint
from saesteer.core.tokens import Tokens
from saesteer.directions.pairs import Pair
from saesteer.directions.places import Side, side_tokens
from saesteer.errors import PairsError


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both int64 [rows, longest], padded on the right.

    On the right, no token's position moves, and none that is no padding sees any.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def both_sides(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> list[tuple[Side, Side]]:
    """The chosen and the rejected side of each pair as token ids.

    Raises:
        PairsError: no pairs, an answer without tokens, or a pair longer than the contexts.
    """
    if not pairs:
        raise PairsError("no contrast pairs; expected at least one, 128 are a good number")
    found = []
    for i, pair in enumerate(pairs, 1):
        both = tuple(side_tokens(tokenizer, pair.prompt, a) for a in (pair.chosen, pair.rejected))
        for side, answer in zip(both, (pair.chosen, pair.rejected), strict=True):
            if len(side.ids) == side.start:
                raise PairsError(f"pair {i}: {answer!r} has no tokens; give it some text")
            check_length(model, side.ids, f"pair {i}")
        found.append((both[0], both[1]))
    return found


def check_length(model: PreTrainedModel, ids: Sequence[int], where: str) -> None:
    """PairsError where a text is longer than the model's contexts."""
    longest = contexts_hold(model)
    if longest is not None and len(ids) > longest:
        raise PairsError(
            f"{where}: {len(ids)} tokens, but the model's contexts hold {longest}; shorten it or "
            "leave it out"
        )


def contexts_hold(model: PreTrainedModel) -> int | None:
    """The most tokens in a context, where the configuration says it."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def added(x: Tensor, vector: Tensor, tokens: Tokens) -> Tensor:
    """x [batch, seq, d] + vector [d] on the plain tokens, neither special nor padding."""
    new = x + vector.to(x.device)
    plain = tokens.is_plain
    return new if plain is None else torch.where(plain[..., None], new, x)


def layers_of(points: Sequence[HookPoint]) -> list[int]:
    """The blocks that points are in, each once, in order."""
    return sorted({point.layer for point in points})
