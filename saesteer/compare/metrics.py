"""The figures of a comparison, from margins, costs and scores that were already measured.

slopes, slope_summary  steerability: how much a unit of strength moves each prompt's margin
relative_ood           what is left of it out of distribution
pres                   change of the likelihoods where there was room for it
harmonic               concept × relevance × fluency in one number from 0 to 2
best_within, headline  E(δ): the effect at the strength chosen on validation within a cost budget
alpha_break            the smallest strength that breaks the model
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saesteer.compare.statistics import Clusters, Estimate, bootstrap, wilson
from saesteer.errors import SteeringError

BREAK = 0.5
"""Nats of ΔCE above which the model counts as broken (α_break), and that α_max keeps to."""
STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Strengths that steerability is measured at (Tan et al. 2024), raw or in units of α_max."""
QUANTILES = (5, 25, 50, 75, 95)
SHARES = (0.25, 0.5, 0.75)
"""Of the prompts with most room to move, those that Pres et al. average over."""


@dataclass(frozen=True)
class SlopeSummary:
    """Steerability over prompts: nats a token for a unit of strength.

    mean: Tan et al.'s steerability. sd: over prompts (n − 1), 0 of one. quantiles: by percent.
    anti_steerable: share of prompts with a slope below 0, with its Wilson interval.
    """

    mean: float
    sd: float
    quantiles: dict[str, float]
    anti_steerable: Estimate


@dataclass(frozen=True)
class Room:
    """Pres et al.'s figures at one share of the prompts with most room to move.

    positive: mean of steered − control over the likelihoods of positives that were least likely.
    negative: mean of control − steered over those of negatives that were most likely. Both are
    above 0 where steering does what it should. n: prompts a side.
    """

    share: float
    positive: float
    negative: float
    n: int


def slopes(strengths: ArrayLike, margins: ArrayLike) -> NDArray[np.float64]:
    """The least-squares slope of each prompt's margin over the strengths: [s], [s, n] → [n].

    Raises:
        SteeringError: shapes that don't match, or fewer than two unlike strengths.
    """
    x, m = np.asarray(strengths, dtype=np.float64), np.asarray(margins, dtype=np.float64)
    if x.ndim != 1 or m.ndim != 2 or len(x) != len(m):
        raise SteeringError(
            f"strengths of shape {x.shape} and margins of shape {m.shape}: "
            "expected [s] and [s, n], a row of margins for each strength"
        )
    if len(x) == 0 or np.ptp(x) == 0:
        raise SteeringError("a slope needs margins at two unlike strengths or more")
    apart = x - x.mean()
    return np.asarray(apart @ m / (apart @ apart))


def slope_summary(slopes: ArrayLike) -> SlopeSummary:
    """Mean, spread and anti-steerable share of per-prompt slopes [n]: see `SlopeSummary`.

    Raises:
        SteeringError: no slopes.
    """
    s = np.asarray(slopes, dtype=np.float64).ravel()
    if len(s) == 0:
        raise SteeringError("there are no slopes to sum up; measure the margins of some prompts")
    return SlopeSummary(
        float(s.mean()),
        float(s.std(ddof=1)) if len(s) > 1 else 0.0,
        {str(q): float(np.percentile(s, q)) for q in QUANTILES},
        wilson(int((s < 0).sum()), len(s)),
    )


def relative_ood(inside: float, outside: float) -> float | None:
    """The effect out of distribution as a share of that in distribution.

    None where there is no effect above 0 in distribution that a share could be taken of.
    """
    return outside / inside if inside > 0 else None


def pres(
    control_positive: ArrayLike,
    control_negative: ArrayLike,
    steered_positive: ArrayLike,
    steered_negative: ArrayLike,
    normalise: Literal["raw", "own", "control"] = "raw",
    shares: Sequence[float] = SHARES,
) -> tuple[Room, ...]:
    """Pres et al. 2024: how likelihoods move where they have most room to, by share of prompts.

    All [n]: mean log-likelihoods (nats a token, below 0) of the continuations that show the
    behaviour and of those that don't, without steering and with it, prompts in the same order. The
    least likely positives and the most likely negatives are picked by the control.

    normalise: "raw" takes them as they are. "own" divides the control's by −max of the control's
    and the steered ones by −max of the steered ones, max over positives and negatives: what the
    authors' code does; where steering moves its own max the two are in unlike units. "control"
    divides both by the control's.

    Raises:
        SteeringError: unlike lengths, no prompts, or log-likelihoods of 0 to divide by.
    """
    given = (control_positive, control_negative, steered_positive, steered_negative)
    likelihoods = [np.asarray(one, dtype=np.float64) for one in given]
    if len({one.shape for one in likelihoods}) > 1 or likelihoods[0].ndim != 1:
        shapes = ", ".join(str(one.shape) for one in likelihoods)
        raise SteeringError(f"log-likelihoods of shapes {shapes}: expected four of the same [n]")
    n = len(likelihoods[0])
    if n == 0:
        raise SteeringError("there are no likelihoods to compare; give those of one prompt or more")
    if normalise != "raw":
        control, steered = (-max(one.max() for one in likelihoods[i : i + 2]) for i in (0, 2))
        if normalise == "control":
            steered = control
        if control <= 0 or steered <= 0:
            raise SteeringError(
                "the largest log-likelihood is not below 0 and can't be divided by; use 'raw'"
            )
        likelihoods = [
            one / by
            for one, by in zip(likelihoods, (control, control, steered, steered), strict=True)
        ]
    up, down, steered_up, steered_down = likelihoods
    first = np.argsort(up, kind="stable")
    second = np.argsort(-down, kind="stable")
    gained, lost = (steered_up - up)[first], (down - steered_down)[second]
    return tuple(
        Room(share, float(gained[:k].mean()), float(lost[:k].mean()), k)
        for share in shares
        for k in [max(1, int(n * share))]
    )


def harmonic(concept: ArrayLike, relevance: ArrayLike, fluency: ArrayLike) -> NDArray[np.float64]:
    """The harmonic mean of three scores from 0 to 2 of each text (AxBench): [n] each → [n].

    0 where any of the three is 0.

    Raises:
        SteeringError: unlike lengths, or a score outside 0 … 2.
    """
    given = [np.asarray(one, dtype=np.float64) for one in (concept, relevance, fluency)]
    if len({one.shape for one in given}) > 1:
        raise SteeringError(
            f"{', '.join(str(one.shape) for one in given)} scores: expected three for each text"
        )
    scores = np.stack(given)
    if not np.all((scores >= 0) & (scores <= 2)):
        raise SteeringError("a score lies outside 0 … 2; put the scorer's range on that scale")
    least = scores.min(0)  # divided out first: 1 / x overflows for the smallest x
    with np.errstate(invalid="ignore"):
        found = 3 * least / (least / scores).sum(0)
    return np.where(least > 0, found, 0.0)


def best_within(gains: ArrayLike, delta_ce: ArrayLike, delta: float) -> int | None:
    """The row that E(δ) is measured at: the highest gain above 0 among those with ΔCE ≤ δ.

    gains, delta_ce: [k], on validation, a row for each setting and strength. Of equal gains the
    cheaper, then the first. None (no edit) where no row within the budget gains anything; a row
    whose gain or cost is not a number is never taken.

    Raises:
        SteeringError: unlike lengths.
    """
    gain, cost = np.asarray(gains, dtype=np.float64), np.asarray(delta_ce, dtype=np.float64)
    if gain.shape != cost.shape or gain.ndim != 1:
        raise SteeringError(
            f"gains of shape {gain.shape} and costs of shape {cost.shape}: expected [k] of each"
        )
    allowed = [i for i in range(len(gain)) if gain[i] > 0 and cost[i] <= delta]
    return min(allowed, key=lambda i: (-gain[i], cost[i], i), default=None)


def headline(
    gains: ArrayLike,
    delta_ce: ArrayLike,
    test_gains: Sequence[ArrayLike],
    delta: float,
    *,
    clusters: Clusters = None,
    seed: int = 0,
) -> Estimate:
    """E(δ): the mean gain on test at the row that `best_within` takes on validation.

    gains, delta_ce: [k], on validation. test_gains: of each row [n] or [draws, n], margin less that
    without the edit, nats a token. 0 without an interval where no edit is chosen.

    Raises:
        SteeringError: unlike lengths; see `best_within` and `bootstrap`.
    """
    row = best_within(gains, delta_ce, delta)
    if len(test_gains) != np.size(gains):
        raise SteeringError(
            f"{len(test_gains)} rows on test for {np.size(gains)} on validation; give one for each"
        )
    if row is None:
        n = np.shape(test_gains[0])[-1] if len(test_gains) else 0
        return Estimate(0.0, None, None, n, f"no edit: nothing gains within ΔCE ≤ {delta:g}")
    return bootstrap(test_gains[row], clusters, seed=seed)


def alpha_break(strengths: Sequence[float], delta_ce: Sequence[float]) -> float | None:
    """The smallest strength measured with ΔCE > .5, of either sign; None where none had."""
    broken = [s for s, ce in zip(strengths, delta_ce, strict=True) if ce > BREAK]
    return min(broken, key=abs, default=None)
