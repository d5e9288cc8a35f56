"""Forward passes as edits saw them, one by one and side by side."""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saesteer.core.tokens import Tokens


class Pass(NamedTuple):
    """One forward pass as edits that act at once saw it.

    eligible: the tokens they are for; chosen: those of them on which their condition held; bool
    [batch, seq], None for all. x: the activation [batch, seq, d]. change: Δ [batch, seq, d], or
    its norm by edit [n], where it is everywhere the same. before, after: readings
    [batch, seq, m].
    """

    tokens: Tokens
    eligible: Tensor | None
    chosen: Tensor | None
    x: Tensor
    change: Tensor
    before: Tensor | None = None
    after: Tensor | None = None


def by_prompt(passes: list[Pass]) -> list[tuple[int, list[Pass]]]:
    """Passes that followed one another in one prompt, with its number."""
    groups = groupby(passes, key=lambda one: one.tokens.prompt_index)
    return [(prompt, list(group)) for prompt, group in groups]


def masks_of(passes: list[Pass], masks: list[Tensor | None]) -> Tensor:
    """Masks [batch, seq], None for all of a pass, side by side."""
    if any(mask is not None for mask in masks):
        return joined(passes, [mask_of(*pair) for pair in zip(passes, masks, strict=True)])
    width = sum(max(one.tokens.kept - one.tokens.first_new, 0) for one in passes)
    rows = passes[0].tokens.shape[0]
    return torch.ones(rows, width, dtype=torch.bool, device=passes[0].x.device)


def mask_of(one: Pass, mask: Tensor | None) -> Tensor:
    """A mask [batch, seq] of a pass, written out where it is None for all."""
    if mask is not None:
        return mask
    return torch.ones(one.tokens.shape, dtype=torch.bool, device=one.x.device)


def norm(x: Tensor) -> Tensor:
    """‖x‖ over the last dimension, in float32 at least, out of the graph."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=wide)


def norms_of(passes: list[Pass], parts: list[Tensor]) -> Tensor:
    """‖·‖ over d of parts [batch, seq, d]; of those that are norms already d is 1."""
    if len({part.shape[-1] for part in parts}) == 1:
        return norm(joined(passes, parts))
    return joined(passes, [norm(part) for part in parts])


def joined(passes: list[Pass], parts: list[Any]) -> Tensor:
    """Parts [batch, seq, ...], one a pass, side by side; what a pass saw again is left out, and
    guesses that were not taken."""
    pairs = zip(passes, parts, strict=True)
    return torch.cat([part[:, one.tokens.first_new : one.tokens.kept] for one, part in pairs], 1)
