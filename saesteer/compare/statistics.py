"""How sure a figure is: hierarchical bootstrap, paired tests, and corrections for many of them.

A figure's values stand in a grid: columns are prompts, which may belong to groups (concepts), and
rows are draws (of the pairs an arm was fitted on, or of a seed), where there are several. What is
estimated is the mean over draws and prompts; with groups, the mean of the groups' means. A
resample draws the draws, then the groups, then the prompts inside each group drawn, all with
replacement: draws × prompts crossed is the pigeonhole bootstrap (Owen 2007), groups then prompts
the nested one (Davison & Hinkley 1997, section 3.8).

Two intervals are made of it. "percentile" takes the quantiles of the resampled means: with m groups
it is too narrow by about √(1 − 1/m) and uses the normal's tails where Student's t_{m−1} are due.
"t" (Efron & Tibshirani 1993, section 12.5) divides each resampled deviation by its own standard
error, which mends both, and is the default; benchmarks/coverage_of_intervals.py measures the two.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saesteer.compare.resampling import Grid, Resamples, differences, grid, resample
from saesteer.errors import ConfigError, SteeringError

Method = Literal["t", "percentile"]
Clusters = Sequence[Hashable] | NDArray[Any] | None

RESAMPLES = 10_000
CONCEPTS_FOR_CLAIM = 16
"""Concepts that a claim across concepts needs (METHODS.md, section 3.4)."""
UNITS_FOR_T = 6
"""Groups or prompts below which Student's t is used: too many resamples hold one of them only."""
LONE, LONE_SHARE = 0.2, 0.005
"""Bootstrap-t has nothing sound to divide by, and gives way to Student's t, where more than this
share of the resamples have less than this part of the standard error: a few outliers carry it."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    low, high: None where nothing could be resampled (one value). n: prompts. how: what the interval
    is, in words for a caption.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    how: str


@dataclass(frozen=True)
class Comparison:
    """The paired difference a − b, and the two-sided p of no difference (1 where n is 1)."""

    difference: Estimate
    p: float


@dataclass(frozen=True)
class Claim:
    """What so many concepts allow to be said; note: why, in words for the report."""

    across: bool
    note: str


def bootstrap(
    values: ArrayLike,
    clusters: Clusters = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    method: Method = "t",
) -> Estimate:
    """The mean of values [n] or [draws, n] with its bootstrap interval.

    clusters [n]: the group (concept) of each prompt, of any size each; None, or all the same:
    prompts alone are resampled.

    Raises:
        SteeringError: no values, values that aren't finite, or clusters of another length.
        ConfigError: level or resamples out of range, or another method.
    """
    _check(level, resamples, method)
    given = grid(values, clusters)
    return _estimate(given, _drawn(given, seed, resamples, method), level, method)


def paired(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    method: Method = "t",
) -> Comparison:
    """a − b on the same prompts, [n] or [draws, n] each, and the two-sided p of no difference.

    p and the interval come from the same resamples: 0 lies outside the interval where p < 1 − level
    (up to one resample). A p is never below 2 / (resamples + 1).

    Raises:
        SteeringError, ConfigError: see `bootstrap` and `differences`.
    """
    _check(level, resamples, method)
    given = grid(differences(a, b), clusters)
    found = _drawn(given, seed, resamples, method)
    p = min(1.0, 2 * min(_tails(given, found, 0.0, method)))
    return Comparison(_estimate(given, found, level, method), p)


def non_inferior(
    apart: ArrayLike,
    margin: float,
    clusters: Clusters = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    method: Method = "t",
) -> float:
    """One-sided p of "worse by margin or more", for differences a − b [n] or [draws, n].

    Small: a is no worse than b by as much as the margin.

    Raises:
        ConfigError: a margin of 0 or less. SteeringError: see `bootstrap`.
    """
    _check(0.95, resamples, method, margin)
    given = grid(apart, clusters)
    return _tails(given, _drawn(given, seed, resamples, method), -margin, method)[1]


def tost(
    apart: ArrayLike,
    margin: float,
    clusters: Clusters = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    method: Method = "t",
) -> float:
    """p of two one-sided tests (Schuirmann 1987): small where |a − b| is below the margin.

    The larger of the p of "a is worse by margin or more" and of "a is better by margin or more",
    for differences a − b [n] or [draws, n].

    Raises:
        ConfigError: a margin of 0 or less. SteeringError: see `bootstrap`.
    """
    _check(0.95, resamples, method, margin)
    given = grid(apart, clusters)
    found = _drawn(given, seed, resamples, method)
    not_worse = _tails(given, found, -margin, method)[1]
    return max(not_worse, _tails(given, found, margin, method)[0])


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjustment of p [k], which keeps the family-wise error: [k]."""
    given = _ps(p)
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Benjamini & Hochberg's (1995) adjustment of p [k], which keeps the false discovery rate."""
    from scipy.stats import false_discovery_control

    given = _ps(p)
    return np.asarray(false_discovery_control(given)) if len(given) else given


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's (1927) score interval.

    Raises:
        SteeringError: n below 1, or successes outside 0 … n.
    """
    from scipy.stats import binomtest

    if n < 1 or not 0 <= successes <= n:
        raise SteeringError(f"{successes} of {n} is no share; give 0 ≤ successes ≤ n with n ≥ 1")
    _check(level, RESAMPLES, "t")
    found = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    how = f"{level:.0%} Wilson interval of {n:,} prompts"
    return Estimate(successes / n, float(found.low), float(found.high), int(n), how)


def claimable(n_concepts: int) -> Claim:
    """Whether that many concepts carry a claim across concepts, or one a concept only."""
    if n_concepts >= CONCEPTS_FOR_CLAIM:
        return Claim(True, f"{n_concepts} concepts: claims across concepts, concepts resampled.")
    return Claim(
        False,
        f"{n_concepts} {'concept' if n_concepts == 1 else 'concepts'}: a claim across concepts "
        f"needs {CONCEPTS_FOR_CLAIM} or more. Prompts are resampled within each concept, and what "
        "is said holds for these concepts only.",
    )


def _drawn(given: Grid, seed: int, resamples: int, method: Method) -> Resamples | None:
    """The resamples; None where they would say nothing: see `UNITS_FOR_T` and `LONE`."""
    few = given.units < (UNITS_FOR_T if method == "t" else 2)
    if few or given.error() == 0:
        return None
    found = resample(given, seed=seed, resamples=resamples, errors=method == "t")
    lone = method == "t" and (found.errors < LONE * given.error()).mean() > LONE_SHARE
    return None if lone else found


def _estimate(given: Grid, found: Resamples | None, level: float, method: Method) -> Estimate:
    mean = given.mean()
    if given.units < 2:
        what = "one value" if given.n == 1 else "one group"
        return Estimate(mean, None, None, given.n, f"{what}, no interval")
    error = given.error()
    if error == 0:
        return Estimate(mean, mean, mean, given.n, "all values are the same: no spread to resample")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if found is None:
        from scipy.stats import t

        low, high = mean + t.ppf(tails, given.freedom) * error
        name = "Student's t interval"
    elif method == "t":
        high, low = mean - np.quantile(_pivots(found, mean), tails) * error
        name = f"bootstrap-t interval, {len(found.means):,} resamples"
    else:
        low, high = np.quantile(found.means, tails)
        name = f"percentile bootstrap interval, {len(found.means):,} resamples"
    return Estimate(mean, float(low), float(high), given.n, f"{level:.0%} {name} {_of(given)}")


def _tails(
    given: Grid, found: Resamples | None, null: float, method: Method
) -> tuple[float, float]:
    """One-sided p of a true mean ≥ null (small: it is below) and of one ≤ null (small: above)."""
    if given.units < 2:
        return 1.0, 1.0
    mean, error = given.mean(), given.error()
    if error == 0:  # no spread at all: the mean is what it is
        return float(mean >= null), float(mean <= null)
    score = (mean - null) / error
    if found is None:
        from scipy.stats import t

        return float(t.cdf(score, given.freedom)), float(t.sf(score, given.freedom))
    if method == "t":
        scores = _pivots(found, mean)
        below, above = int((scores <= score).sum()), int((scores >= score).sum())
    else:
        below, above = int((found.means >= null).sum()), int((found.means <= null).sum())
    count = len(found.means)
    return (below + 1) / (count + 1), (above + 1) / (count + 1)


def _pivots(found: Resamples, mean: float) -> NDArray[np.float64]:
    """(m* − m) / se* of every resample; one without spread counts as endlessly far."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (found.means - mean) / found.errors
    return np.nan_to_num(scores, nan=0.0, posinf=1e12, neginf=-1e12)


def _of(given: Grid) -> str:
    draws = f", and of {given.draws} draws" if given.draws > 1 else ""
    if given.sizes is None:
        return f"of {given.n:,} prompts{draws}"
    return f"of {given.units} groups, of the prompts in each{draws}"


def _check(level: float, resamples: int, method: str, margin: float = 1.0) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level {level:g}: expected a share between 0 and 1, such as 0.95")
    if resamples < 100:
        raise ConfigError(f"{resamples} resamples: expected 100 or more; 10,000 is usual")
    if method not in ("t", "percentile"):
        raise ConfigError(f"method {method!r}: expected 't' or 'percentile'")
    if not margin > 0:
        raise ConfigError(
            f"margin {margin:g}: expected a number above 0, set before the test is looked at"
        )


def _ps(p: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(p, dtype=np.float64)
    if given.ndim != 1 or not np.all((given >= 0) & (given <= 1)):
        raise SteeringError("p values must be a list of numbers from 0 to 1")
    return given
