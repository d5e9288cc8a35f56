"""Strengths on one scale: those that cost the same KL, and the norm that a vector is added to."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint, special_token_ids
from saesteer.effects.damage import Reference, Text, padded, token_rows
from saesteer.errors import SteeringError
from saesteer.steering.edits import Edit

EditsAt = Callable[[float], Sequence[Edit]]
"""The edits of a strength."""


def check_budget(budget: float) -> None:
    """Refuse a KL budget that is no positive number: SteeringError."""
    if not 0 < budget < math.inf:
        raise SteeringError(f"a KL budget of {budget} nats: give a number above 0, such as 0.5")


def iso_kl(
    model: PreTrainedModel,
    tokenizer: Any,
    edits_at: EditsAt,
    texts: Sequence[Text],
    budget: float,
    *,
    lo: float = 0.0,
    hi: float | None = None,
    grid: int = 16,
    tolerance: float = 0.01,
    prepend_bos: bool = True,
    prompt_length: int | None = None,
) -> float:
    """The strength closest to `lo` at which the mean KL(p_0 ‖ p_α) on `texts` is the budget.

    KL need not rise with the strength. So the first of `grid` equal steps from lo to hi that ends
    above the budget is looked for, and bisected; what rises and falls again between two steps is
    not seen.

    Args:
        budget: nats a plain token.
        lo, hi: where to look; hi may be negative. None: 1, doubled until KL is above the budget.
        tolerance: how far KL may be from the budget, as a share of it.

    Raises:
        SteeringError: the budget isn't reached, is passed at `lo` already, or is jumped over.
    """
    check_budget(budget)
    reference = Reference(
        model, tokenizer, texts, prepend_bos=prepend_bos, prompt_length=prompt_length
    )

    def kl_at(strength: float) -> float:
        return reference.cost(list(edits_at(strength))).kl

    below, kl_below = lo, kl_at(lo)
    if kl_below > budget * (1 + tolerance):
        raise SteeringError(
            f"strength {lo:g} costs {kl_below:.4g} nats of KL already, over the budget of "
            f"{budget:g}; begin elsewhere (lo=…) or raise the budget"
        )
    if kl_below >= budget * (1 - tolerance):
        return lo
    if hi is None:
        hi = lo + 1.0
        while hi - lo < 2**30 and kl_at(hi) < budget:
            hi = lo + 2 * (hi - lo)
    highest = kl_below
    for step in range(1, grid + 1):
        above = lo + (hi - lo) * step / grid
        kl_above = kl_at(above)
        highest = max(highest, kl_above)
        if kl_above >= budget:
            break
        below = above
    else:
        raise SteeringError(
            f"no strength from {lo:g} to {hi:g} costs {budget:g} nats of KL, {highest:.4g} is the "
            "most; look further (hi=…) or lower the budget"
        )
    for _ in range(80):
        if abs(kl_above - budget) <= tolerance * budget:
            return above
        middle = (below + above) / 2
        kl_middle = kl_at(middle)
        if abs(kl_middle - budget) <= tolerance * budget:
            return middle
        if kl_middle < budget:
            below = middle
        else:
            above, kl_above = middle, kl_middle
    raise SteeringError(
        f"KL jumps over {budget:g} nats at strength {above:g} (to {kl_above:.4g}): no strength "
        "costs just that; take another budget, or a wider tolerance"
    )


def mean_norm(
    model: PreTrainedModel,
    tokenizer: Any,
    point: HookPoint,
    texts: Sequence[Text],
    *,
    prepend_bos: bool = True,
    batch_size: int = 16,
) -> float:
    """Mean ‖x‖ at a hook point over plain tokens (neither special nor padding) of the texts.

    Raises:
        SteeringError: every token is a special one. HookPointError: no such place.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    rows = token_rows(tokenizer, texts, prepend_bos=prepend_bos, most=room)
    special = torch.tensor(sorted(special_token_ids(model, tokenizer)), dtype=torch.long)
    total, n = 0.0, 0
    for start in range(0, len(rows), batch_size):
        ids, mask = padded(rows[start : start + batch_size])
        plain = (mask == 1) & ~torch.isin(ids, special)
        x = activations(model, [point], ids, mask)[point].float().norm(dim=-1).cpu()
        total += float(x[plain].double().sum())
        n += int(plain.sum())
    if n == 0:
        raise SteeringError("every token of the texts is a special one; give text with words")
    return total / n
