"""What the activations of contrast pairs say about a direction before anyone steers with it.

Pairs whose differences agree, and sides that lie apart along the direction, go with vectors that
steer reliably (Tan et al. 2024, arXiv 2407.12404; Braun et al. 2025, arXiv 2505.22637).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saesteer.directions.groups import split
from saesteer.errors import PairsError

Fit = Callable[[Tensor, Tensor], Tensor]
"""From chosen and rejected activations [n, d] to a direction [d], as `directions.METHODS` do it."""


@dataclass(frozen=True)
class Spread:
    """A mean over n random draws of pairs, and what 95% of the draws lie between."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Separability:
    """How far the two sides lie apart in x·v/‖v‖.

    Attributes:
        auroc: the chance that a chosen side scores higher than a rejected one (.5: no contrast).
        d_prime: difference of means in pooled standard deviations; None where that is 0 or n < 2.
    """

    auroc: float
    d_prime: float | None


@dataclass(frozen=True)
class Halves:
    """What two random halves of the pairs say of one another, over seeded splits.

    Pairs of one group, which ask the same, are in one half.

    Attributes:
        pairs: in the first half, on which is fitted; a few less where groups don't come out even.
        cosine: of the directions of the two halves.
        auroc, d_prime: of one half's direction on the pairs of the other, which it wasn't fitted
            on; d_prime is None where a half has a single pair, or all scores are equal.
    """

    pairs: int
    cosine: Spread
    auroc: Spread
    d_prime: Spread | None


@dataclass(frozen=True)
class PairFigures:
    """What the pairs say of a direction.

    Attributes:
        n_pairs: how many.
        mean_cosine: between the differences of two pairs, mean over all couples of pairs whose
            sides differ; None where there are fewer than two of those.
        n_equal: pairs whose two sides have the same activation.
        separability: on the pairs that the direction was fitted on, and so flattered: with fewer
            pairs than dimensions random ones lie apart too. `halves` is not flattered.
        halves: None where the direction can't be fitted again, or there are fewer than four groups
            of pairs.
        growth: (n, cos(v_n, v)) with v_n fitted on n of the pairs: it must come to 1 at all of
            them, and says something where it is near 1 long before.
        norm: ‖v‖. read_norm: the mean norm of the activations that were read.
    """

    n_pairs: int
    mean_cosine: float | None
    n_equal: int
    separability: Separability
    halves: Halves | None
    growth: tuple[tuple[int, Spread], ...]
    norm: float
    read_norm: float


def pair_figures(
    vector: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    fit: Fit | None,
    *,
    groups: Sequence[int] | None = None,
    splits: int = 100,
    draws: int = 20,
    seed: int = 0,
) -> PairFigures:
    """Judge a direction [d] by the activations of its pairs, chosen and rejected [n, d].

    Args:
        fit: makes the direction from activations, to fit it again on some of the pairs; None: it
            can't be, and what needs it is left out.
        groups: for each pair its group, which halves are made of (`directions.groups.groups_of`);
            None: each pair is its own.
        splits: into halves; draws: of n pairs for each n. Both are seeded.

    Raises:
        PairsError: no pairs, shapes that don't belong together, or a direction of norm 0.
    """
    chosen, rejected = chosen.detach().double().cpu(), rejected.detach().double().cpu()
    if chosen.dim() != 2 or chosen.shape != rejected.shape or not len(chosen):
        raise PairsError(
            f"activations of shape {tuple(chosen.shape)} and {tuple(rejected.shape)}; expected "
            "[pairs, dimensions] twice, a row for each side of each pair"
        )
    vector = vector.detach().double().cpu()
    if vector.shape != chosen.shape[1:]:
        raise PairsError(
            f"a direction of shape {tuple(vector.shape)} for activations of width "
            f"{chosen.shape[1]}; read the pairs where the direction was fitted"
        )
    norm = float(vector.norm())
    if not 0 < norm < math.inf:
        raise PairsError(
            f"a direction of norm {norm} can't be judged; fit it on pairs whose sides differ"
        )
    groups = range(len(chosen)) if groups is None else groups
    if len(groups) != len(chosen):
        raise PairsError(f"groups of {len(groups)} pairs for activations of {len(chosen)}")
    differences = chosen - rejected
    sizes = differences.norm(dim=-1)
    return PairFigures(
        n_pairs=len(chosen),
        mean_cosine=mean_cosine(differences[sizes > 0]),
        n_equal=int((sizes == 0).sum()),
        separability=separability(chosen @ vector, rejected @ vector),
        halves=_halves(chosen, rejected, fit, groups, splits, seed) if fit else None,
        growth=_growth(vector, chosen, rejected, fit, draws, seed) if fit else (),
        norm=norm,
        read_norm=float(torch.cat([chosen, rejected]).norm(dim=-1).mean()),
    )


def mean_cosine(rows: Tensor) -> float | None:
    """The mean cosine over all couples of different rows [n, d], none of them 0; None of one."""
    n = len(rows)
    if n < 2:
        return None
    # Σ_ij cos = ‖Σ unit rows‖², of which n are a row with itself.
    total = float((rows / rows.norm(dim=-1, keepdim=True)).sum(0).square().sum())
    return (total - n) / (n * (n - 1))


def separability(chosen: Tensor, rejected: Tensor) -> Separability:
    """Of scores [n] and [m]; ties count half."""
    from scipy.stats import rankdata

    a, b = chosen.double().numpy(), rejected.double().numpy()
    ranks = rankdata(np.concatenate([a, b]))[: len(a)].sum()
    auroc = float((ranks - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))
    d_prime = None
    if min(len(a), len(b)) > 1 and (spread := (a.var(ddof=1) + b.var(ddof=1)) / 2) > 0:
        d_prime = float((a.mean() - b.mean()) / math.sqrt(spread))
    return Separability(auroc, d_prime)


def _halves(
    chosen: Tensor, rejected: Tensor, fit: Fit, groups: Sequence[int], splits: int, seed: int
) -> Halves | None:
    if len(set(groups)) < 4:
        return None
    rng = np.random.default_rng([seed % 2**32, 21])
    n = len(chosen)
    found: list[tuple[float, float, float | None]] = []
    for _ in range(splits):
        parts = split(groups, n // 2, rng)
        try:
            first, second = (_unit(fit(chosen[at], rejected[at])) for at in parts)
        except PairsError:  # a half that the method can't be fitted on, such as too few pairs
            continue
        other = parts[1]
        apart = separability(chosen[other] @ first, rejected[other] @ first)
        found.append((float(first @ second), apart.auroc, apart.d_prime))
    if not found:
        return None
    d_primes = [d for *_, d in found if d is not None]
    return Halves(
        n // 2,
        spread([cosine for cosine, _, _ in found]),
        spread([auroc for _, auroc, _ in found]),
        spread(d_primes) if len(d_primes) == len(found) else None,
    )


def _growth(
    vector: Tensor, chosen: Tensor, rejected: Tensor, fit: Fit, draws: int, seed: int
) -> tuple[tuple[int, Spread], ...]:
    rng = np.random.default_rng([seed % 2**32, 22])
    unit, n = _unit(vector), len(chosen)
    found = []
    for size in [*(2**i for i in range(n.bit_length()) if 2**i < n), n]:
        cosines = []
        for _ in range(draws if size < n else 1):
            at = torch.from_numpy(np.sort(rng.permutation(n)[:size]))
            try:
                cosines.append(float(_unit(fit(chosen[at], rejected[at])) @ unit))
            except PairsError:  # too few for the method, or no difference between their sides
                continue
        if cosines:
            found.append((size, spread(cosines)))
    return tuple(found)


def spread(values: Sequence[float] | NDArray[np.float64]) -> Spread:
    """The mean of draws [n], and their 2.5% and 97.5% quantiles."""
    values = np.asarray(values, np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return Spread(float(values.mean()), float(low), float(high), len(values))


def _unit(vector: Tensor) -> Tensor:
    vector = vector.double()
    return vector / vector.norm().clamp_min(1e-300)
