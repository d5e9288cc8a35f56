"""Resampled means of a grid of draws × prompts in groups, and the standard error of each."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saesteer.errors import SteeringError

Floats = NDArray[np.float64]

CELLS = 2_000_000
"""Numbers held at once."""
DRAWN = 5_000_000
"""Prompts drawn for the pools of resampled group means."""


@dataclass(frozen=True)
class Grid:
    """Values by draw and prompt, the prompts of a group side by side.

    Attributes:
        cells: [draws, n].
        sizes: prompts in each group, [groups]; None where prompts stand for themselves.
        table: [draws, units], the mean of each unit: of a group, or the prompt's own value.
    """

    cells: Floats
    sizes: NDArray[np.int64] | None
    table: Floats

    @property
    def n(self) -> int:
        return int(self.cells.shape[1])

    @property
    def draws(self) -> int:
        return len(self.cells)

    @property
    def units(self) -> int:
        return int(self.table.shape[1])

    @property
    def freedom(self) -> int:
        """Degrees of freedom of `error`, on the safe side: of the fewer of units and draws."""
        return (min(self.units, self.draws) if self.draws > 1 else self.units) - 1

    def mean(self) -> float:
        return float(self.table.mean())

    def error(self) -> float:
        """Standard error of the mean: see `_errors`; 0 where all values are the same."""
        if np.ptp(self.table) == 0:
            return 0.0  # exactly, whatever the mean's rounding leaves
        by_unit, by_draw = self.table.mean(0), self.table.mean(1)
        mean = self.mean()
        squares = [((part - mean) ** 2).sum() for part in (by_unit, by_draw, self.table)]
        return float(_errors(np.array(squares), self.units, self.draws))


@dataclass(frozen=True)
class Resamples:
    """means [resamples]; errors [resamples], empty where they weren't asked for."""

    means: Floats
    errors: Floats


def grid(values: ArrayLike, clusters: Sequence[Hashable] | NDArray[Any] | None) -> Grid:
    """values [n] or [draws, n], and the group of each prompt [n] or None, as a `Grid`.

    Raises:
        SteeringError: no values, values that aren't finite, or clusters of another length.
    """
    cells = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if cells.ndim != 2 or cells.size == 0:
        raise SteeringError(
            f"values of shape {cells.shape} can't be averaged; give [n] or [draws, n], not empty"
        )
    if not np.isfinite(cells).all():
        bad = int((~np.isfinite(cells)).sum())
        raise SteeringError(
            f"{bad} of {cells.size} values are not finite; find the prompts that gave them, "
            "or leave those prompts out of every arm"
        )
    if clusters is None:
        return Grid(cells, None, cells)
    if len(clusters) != cells.shape[1]:
        raise SteeringError(
            f"{len(clusters)} groups were given for {cells.shape[1]} prompts; give one a prompt"
        )
    numbers: dict[Hashable, int] = {}
    which = np.array([numbers.setdefault(one, len(numbers)) for one in clusters])
    if len(numbers) == 1:
        return Grid(cells, None, cells)
    order = np.argsort(which, kind="stable")
    sizes = np.bincount(which)
    cells = np.ascontiguousarray(cells[:, order])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Grid(cells, sizes, np.add.reduceat(cells, starts, axis=1) / sizes)


def differences(a: ArrayLike, b: ArrayLike) -> Floats:
    """a − b, [draws, n].

    Draw i of both was fitted on the same pairs. Of arms with unlike numbers of draws the first ones
    that both have are compared; one draw (an arm without chance in it) is held against all.

    Raises:
        SteeringError: the prompts are not the same in number.
    """
    first, second = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (a, b))
    if first.shape[1] != second.shape[1]:
        raise SteeringError(
            f"{first.shape[1]} values are to be paired with {second.shape[1]}; "
            "give both arms' values on the same prompts, in the same order"
        )
    if min(len(first), len(second)) > 1:
        draws = min(len(first), len(second))
        first, second = first[:draws], second[:draws]
    return first - second


def resample(given: Grid, *, seed: int, resamples: int, errors: bool) -> Resamples:
    """Draws, groups and prompts drawn with replacement; the mean (and its error) of each resample.

    Resampled group means are drawn from a pool of them, several hundred a group or more, so that
    the work grows with the prompts and not with prompts × resamples.
    """
    rng = np.random.default_rng([seed % 2**32, 7])
    centre = given.mean()  # taken off while squares are summed, for the digits
    pools = None if given.sizes is None else _pools(rng, given, centre, resamples)
    piece = max(1, min(resamples, CELLS // (given.table.size if pools is not None else given.n)))
    means, found = [], []
    for first in range(0, resamples, piece):
        count = min(piece, resamples - first)
        if pools is None:
            mean, squares = _prompts(rng, given.cells - centre, count, errors)
        else:
            mean, squares = _groups(rng, pools, count, errors)
        means.append(mean)
        if errors:
            found.append(_errors(squares, given.units, given.draws))
    return Resamples(
        np.concatenate(means) + centre, np.concatenate(found) if found else np.empty(0)
    )


def _counts(rng: np.random.Generator, rows: int, n: int) -> Floats:
    """How often each of n was drawn in n drawings with replacement, `rows` times: [rows, n]."""
    drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _pools(rng: np.random.Generator, given: Grid, centre: float, resamples: int) -> Floats:
    """Means of the resampled prompts of each group, by draw: [groups, pool, draws]."""
    assert given.sizes is not None
    pool = min(resamples, max(300, min(CELLS // given.table.size, DRAWN // given.n)))
    found, stop = [], 0
    for size in given.sizes:
        cells = given.cells[:, stop : stop + size] - centre
        stop += size
        found.append(_counts(rng, pool, int(size)) @ cells.T / size)
    return np.stack(found)


def _prompts(
    rng: np.random.Generator, cells: Floats, count: int, errors: bool
) -> tuple[Floats, Floats]:
    """Means [count] of resampled cells [draws, n], and the squares [3, count] for `_errors`."""
    draws, n = cells.shape
    v = _counts(rng, count, n)
    w = _counts(rng, count, draws)
    unit = w @ cells / draws
    weighted = v * unit
    mean = weighted.sum(1) / n
    if not errors:
        return mean, np.empty(0)
    by_unit = (weighted * unit).sum(1) - n * mean**2
    by_draw = (w * (v @ cells.T / n) ** 2).sum(1) - draws * mean**2
    total = ((w @ cells**2) * v).sum(1) - draws * n * mean**2
    return mean, np.stack([by_unit, by_draw, total])


def _groups(
    rng: np.random.Generator, pools: Floats, count: int, errors: bool
) -> tuple[Floats, Floats]:
    """As `_prompts`, with groups drawn, and for each of them a mean out of its pool."""
    units, pool, draws = pools.shape
    which = rng.integers(0, units, (count, units))
    cells = pools[which, rng.integers(0, pool, (count, units))]  # [count, units, draws]
    w = _counts(rng, count, draws)
    unit = (cells @ w[:, :, None])[:, :, 0] / draws
    mean = unit.mean(1)
    if not errors:
        return mean, np.empty(0)
    by_unit = (unit**2).sum(1) - units * mean**2
    by_draw = (w * cells.mean(1) ** 2).sum(1) - draws * mean**2
    total = ((cells**2).sum(1) * w).sum(1) - draws * units * mean**2
    return mean, np.stack([by_unit, by_draw, total])


def _errors(squares: Floats, units: int, draws: int) -> Floats:
    """Standard errors of means over draws × units from sums of squares: [3, ...] → [...].

    squares: deviations of the units' means over draws, of the draws' means, and of the cells. The
    units' spread holds their own and a share of the cells' (the interaction); of the draws' spread
    that share, counted already, is taken off: the variance of a two-way random-effects mean.
    """
    by_unit, by_draw, total = squares
    variance = by_unit / ((units - 1) * units)
    if draws > 1:
        cells = (total - draws * by_unit - units * by_draw) / ((draws - 1) * (units - 1))
        more = by_draw / ((draws - 1) * draws) - cells / (draws * units)
        variance = variance + np.maximum(more, 0.0)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)))
