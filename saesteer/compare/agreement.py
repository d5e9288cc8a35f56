"""How far a judge's scores of texts and those of a judge-free scorer agree."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saesteer.compare.statistics import Estimate
from saesteer.errors import SteeringError


@dataclass(frozen=True)
class Agreement:
    """How far a judge and a judge-free score agree on the same texts.

    Attributes:
        spearman: rank correlation; None where either gave all texts the same.
        ordered: of the pairs of texts that the judge tells apart, the share that the judge-free
            score puts in the same order (a tie is not the same); None where there are no such
            pairs. Half is what chance gives where that score has no ties.
        n: texts with both scores. left_out: texts with one missing.
    """

    spearman: Estimate | None
    ordered: Estimate | None
    n: int
    left_out: int


def agreement(
    judge: Sequence[float | None],
    free: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Agreement:
    """How far two scores of the same texts agree: [n] each, in the same order; None: not scored.

    clusters [n]: such as each text's prompt, where several arms wrote to it; clusters are then
    resampled whole, and else texts. The intervals are percentiles of the bootstrap; a resample in
    which all texts score the same says nothing and is left out.

    Raises:
        SteeringError: unlike lengths.
    """
    names = range(len(judge)) if clusters is None else clusters
    if not len(judge) == len(free) == len(names):
        raise SteeringError(
            f"{len(judge)} judged and {len(free)} judge-free scores, {len(names)} clusters: "
            "expected one of each for every text"
        )
    both = [
        (a, b, c) for a, b, c in zip(judge, free, names, strict=True)
        if a is not None and b is not None
    ]  # fmt: skip
    left_out = len(judge) - len(both)
    if not both:
        return Agreement(None, None, 0, left_out)
    a, b = (np.array([one[i] for one in both], dtype=np.float64) for i in (0, 1))
    groups: dict[Hashable, list[int]] = {}
    for i, (_, _, cluster) in enumerate(both):
        groups.setdefault(cluster, []).append(i)
    members = [np.array(rows) for rows in groups.values()]
    rng = np.random.default_rng([seed, 23])
    found = []
    for _ in range(resamples if len(members) > 1 else 0):
        some = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        found.append((_spearman(a[some], b[some]), _ordered(a[some], b[some])))
    spread = np.array(found).reshape(-1, 2)
    of = f"of {len(members)} clusters of texts" if clusters is not None else f"of {len(a)} texts"

    def estimate(value: float, column: int) -> Estimate | None:
        if np.isnan(value):
            return None
        drawn = spread[:, column][~np.isnan(spread[:, column])]
        if len(drawn) == 0:
            return Estimate(value, None, None, len(a), "nothing to resample, no interval")
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        how = f"{level:.0%} percentile bootstrap interval, {len(drawn):,} resamples {of}"
        return Estimate(value, float(low), float(high), len(a), how)

    return Agreement(estimate(_spearman(a, b), 0), estimate(_ordered(a, b), 1), len(a), left_out)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(one) - (len(one) + 1) / 2 for one in (a, b))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def _ordered(judge: ArrayLike, free: ArrayLike) -> float:
    """Of pairs with unlike judge scores, the share in the same strict order by `free`; or NaN."""
    a, b = np.asarray(judge, dtype=np.float64), np.asarray(free, dtype=np.float64)
    # A judge gives few different scores, so a level at a time is fast however many texts there are.
    same, told, below = 0, 0, np.array([])
    for level in np.unique(a):
        here = b[a == level]
        same += int(np.searchsorted(below, here, side="left").sum())
        told += len(below) * len(here)
        below = np.sort(np.concatenate([below, here]))
    return same / told if told else float("nan")
