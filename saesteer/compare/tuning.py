"""What an arm chooses on validation, and with how many evaluations."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saesteer.compare.metrics import best_within
from saesteer.effects.dose import BREAK
from saesteer.errors import SteeringError

_LARGEST = 2.0**10
_SMALLEST = 2.0**-10
_CLOSE = 0.05


MOST = 24
"""Strengths that the search for α_max measures at the most."""


@dataclass(frozen=True)
class Ceiling:
    """α_max: the strength that costs .5 nats of ΔCE on the validation text.

    Attributes:
        strength: the largest that was measured with ΔCE ≤ .5, within 5% of it where `reached`.
        reached: whether any strength costs so much.
        above: the smallest that was measured with ΔCE > .5; None where none was.
        tried: strengths measured, on clean text alone.
    """

    strength: float
    reached: bool
    above: float | None
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tried:
    """One validation evaluation. gain: mean margin less the base's. u: strength / α_max."""

    setting: int
    strength: float
    u: float | None
    gain: float
    delta_ce: float


def alpha_max(
    delta_ce_at: Callable[[float], float], *, limit: float = BREAK, most: int = MOST
) -> Ceiling:
    """Double a strength of 1 until ΔCE is above the limit, or halve it until it isn't; bisect.

    ΔCE need not rise with the strength: what rises and falls again between two doublings isn't
    seen.

    Args:
        delta_ce_at: ΔCE of a strength; infinite where the model's logits are no numbers.
        most: strengths measured at the most.

    Raises:
        SteeringError: the smallest strength costs more.
    """
    below, above, strength = 0.0, None, 1.0
    for tried in range(1, most + 1):
        delta_ce = delta_ce_at(strength)
        if delta_ce > limit or math.isnan(delta_ce):
            above = strength
        else:
            below = strength
            if delta_ce >= limit * (1 - _CLOSE) and above is not None:
                return Ceiling(below, True, above, tried)
        if above is None:
            if strength >= _LARGEST:
                return Ceiling(below, False, None, tried)
            strength *= 2
        elif above - below <= 1e-3 * above:  # ΔCE jumps
            return Ceiling(below, True, above, tried)
        elif below == 0 and above <= _SMALLEST:
            break
        else:
            strength = (below + above) / 2
    if below == 0:
        raise SteeringError(
            f"every strength down to {above:g} costs more than {limit:g} nats of ΔCE on clean "
            "text, so that there is none to choose from"
        )
    return Ceiling(below, above is not None, above, most)


def shares(budget: int, settings: int) -> list[int]:
    """The budget over so many settings, as evenly as whole evaluations go; never 0 for one.

    With a budget below their number, only as many settings are tried.
    """
    tried = min(budget, settings)
    return [budget // tried + (i < budget % tried) for i in range(tried)]


def ladder(ceiling: float, steps: int) -> list[tuple[float, float]]:
    """(u, u · α_max) for u = 1/steps … 1; of one step ½, for α_max itself costs too much."""
    if steps == 1:
        return [(0.5, 0.5 * ceiling)]
    return [(i / steps, i / steps * ceiling) for i in range(1, steps + 1)]


def choose(tried: Sequence[Tried], deltas: Sequence[float]) -> dict[float, Tried | None]:
    """For each δ the evaluation with the highest gain above 0 among those with ΔCE ≤ δ.

    Of equals the one with the lowest ΔCE; None is no edit: none within δ gains anything.
    """
    gains, costs = [one.gain for one in tried], [one.delta_ce for one in tried]
    found: dict[float, Tried | None] = {}
    for delta in deltas:
        best = best_within(gains, costs, delta)
        found[delta] = None if best is None else tried[best]
    return found


def hardest(tried: Sequence[Tried], deltas: Sequence[float]) -> dict[float, Tried | None]:
    """For each δ the evaluation with the highest ΔCE up to δ: how a control is chosen.

    A control that were chosen by its gain would be as weak as it can be, and so no control.
    """
    return {
        delta: max(
            (one for one in tried if one.delta_ce <= delta),
            key=lambda one: one.delta_ce,
            default=None,
        )
        for delta in deltas
    }


def to_json(
    choices: Mapping[float, Tried | None], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """Choices as the report has them, by δ as text."""
    return {
        f"{delta:g}": None
        if one is None
        else {
            "setting": dict(settings[one.setting]),
            "strength": one.strength,
            "u": one.u,
            "validation_gain": one.gain,
            "validation_delta_ce": one.delta_ce,
        }
        for delta, one in choices.items()
    }
