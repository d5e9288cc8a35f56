"""Features by example: those that fire on a text, and those that tell two sets of texts apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saesteer.core.sae_codes import Codes
from saesteer.errors import IndexingError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Likeness:
    """A feature that fires on a text more often than it does elsewhere.

    Attributes:
        score: what ranks it, in nats: `evidence` times `strength`.
        fired: tokens of the text on which it fires; rate: their share of the text.
        base: share of the indexed tokens on which it fires.
        evidence: n · KL(rate ‖ base), the log-likelihood ratio of its rate against its base rate.
        strength: mean activation where it fires, in units of its max_act, each 1 at the most.
    """

    feature: int
    score: float
    fired: int
    rate: float
    base: float
    evidence: float
    strength: float


@dataclass(frozen=True)
class Contrast:
    """A feature that tells a positive set of texts from a negative one; see `contrast`.

    Attributes:
        auroc: probability that a positive text has more of it than a negative one, ties one half.
        effect_size: Cohen's d of the mean activations, positive less negative; None where neither
            set has any spread.
        positive, negative: mean over the texts of the mean activation over their tokens.
        fires_positive, fires_negative: share of the texts in which it fires at all.
    """

    feature: int
    auroc: float
    effect_size: float | None
    positive: float
    negative: float
    fires_positive: float
    fires_negative: float


def by_example(
    codes: Codes,
    *,
    density: NDArray[Any],
    max_act: NDArray[Any],
    n_tokens: int,
    limit: int = 20,
) -> list[Likeness]:
    """Features that fire on a text against their base rate, best first.

    Base rates are smoothed by half a firing, so that a feature that never fired in the index has
    one too. What fires no more often than elsewhere is left out.

    Args:
        codes: of the text's tokens, special ones left out.
        density, max_act: [d_sae], of the index.
        n_tokens: how many tokens the density was measured on.
    """
    if codes.n_rows == 0 or limit < 1:
        return []
    features, which = np.unique(_array(codes.latents), return_inverse=True)
    values = _array(codes.values)
    fired = np.bincount(which, minlength=len(features))
    base = smoothed(density[features], n_tokens)
    highest = np.asarray(max_act, np.float64)[features]
    strength = np.bincount(which, share_of(values, highest[which]), len(features)) / fired
    evidence = _evidence(fired / codes.n_rows, base, codes.n_rows)
    score = evidence * strength
    order = np.lexsort((features, -score))
    return [
        Likeness(
            int(features[i]),
            float(score[i]),
            int(fired[i]),
            float(fired[i] / codes.n_rows),
            float(density[features[i]]),
            float(evidence[i]),
            float(strength[i]),
        )
        for i in order[score[order] > 0][:limit]
    ]


def contrast(
    positive: Sequence[Codes], negative: Sequence[Codes], *, limit: int = 20
) -> list[Contrast]:
    """Features that tell two sets of texts apart, those that do it best first.

    A text counts once, by the mean of a feature's activation over its tokens. The maximum grows
    with a text's length, so that of two sets of unequal texts the longer would have more of
    everything; the mean doesn't, and that a concept is named but once in a long text only
    scales it, which neither figure below minds. Ranked by how far the AUROC is from ½, either
    way, then by effect size; `effect_size` and `auroc` say which way.

    Args:
        positive, negative: each text's codes, special tokens left out; a text without tokens has
            none of anything.

    Raises:
        IndexingError: fewer than two texts on a side, which have no spread to hold a difference
            against.
    """
    n_pos, n_neg = len(positive), len(negative)
    if min(n_pos, n_neg) < 2:
        raise IndexingError(
            f"{n_pos} positive and {n_neg} negative texts: give two or more of each, one a line"
        )
    texts, features, values = _means([*positive, *negative])
    if len(features) == 0:
        return []
    names, which = np.unique(features, return_inverse=True)
    on = texts < n_pos
    sides = [_moments(which[s], values[s], n, len(names)) for s, n in ((on, n_pos), (~on, n_neg))]
    (mean, square, fires), (mean_neg, square_neg, fires_neg) = sides
    spread = np.sqrt((square + square_neg) / max(1, n_pos + n_neg - 2))
    difference = mean - mean_neg
    with np.errstate(divide="ignore", invalid="ignore"):
        d = np.where(spread > 0, difference / spread, np.sign(difference) * np.inf)
    d[np.isnan(d)] = 0.0  # the same everywhere
    area = auroc(which, values, on, n_pos, n_neg, len(names))
    order = np.lexsort((names, -np.abs(d), -np.abs(area - 0.5)))
    order = order[(area[order] != 0.5) | (difference[order] != 0)]
    return [
        Contrast(
            int(names[i]),
            float(area[i]),
            float(d[i]) if math.isfinite(d[i]) else None,
            float(mean[i]),
            float(mean_neg[i]),
            float(fires[i] / n_pos),
            float(fires_neg[i] / n_neg),
        )
        for i in order[:limit]
    ]


def auroc(
    features: NDArray[np.int64],
    values: Floats,
    positive: NDArray[np.bool_],
    n_pos: int,
    n_neg: int,
    n_features: int,
) -> Floats:
    """AUROC of each feature as a detector of the positive items, from what is not zero alone.

    Mann–Whitney U by mid-ranks: items on which a feature is silent tie at the lowest rank.

    Args:
        features, values, positive: [nnz], a feature's value (> 0) on an item, and the item's side;
            an item and a feature come together once.
        n_pos, n_neg: items on each side, silent ones included.

    Returns:
        [n_features].
    """
    order = np.lexsort((values, features))
    features, values, positive = features[order], values[order], positive[order]
    fires = np.bincount(features, minlength=n_features)
    silent = n_pos + n_neg - fires
    # Mid-ranks within runs of one feature and value; a feature's ranks begin after its silent ones.
    new = np.ones(len(values), dtype=bool)
    new[1:] = (features[1:] != features[:-1]) | (values[1:] != values[:-1])
    starts = np.flatnonzero(new)
    lengths = np.diff(np.append(starts, len(values)))
    begins = np.concatenate([[0], np.cumsum(fires)[:-1]])
    rank = (starts - begins[features[starts]] + (lengths + 1) / 2)[np.cumsum(new) - 1]
    rank += silent[features]
    fires_pos = np.bincount(features[positive], minlength=n_features)
    fired: Floats = np.bincount(features, rank * positive, n_features).astype(np.float64)
    rank_sum = fired + (n_pos - fires_pos) * (silent + 1) / 2
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)


def smoothed(density: NDArray[Any], n_tokens: int) -> Floats:
    """Base rates above 0 and below 1, from densities measured on so many tokens."""
    return (np.asarray(density, np.float64) * n_tokens + 0.5) / (n_tokens + 1)


def share_of(values: NDArray[Any], highest: NDArray[Any]) -> Floats:
    """Activations in units of their feature's highest, 1 at the most, and where that is 0."""
    return np.asarray(values, np.float64) / np.maximum(values, highest)


def _evidence(rate: Floats, base: Floats, n: int) -> Floats:
    """n · KL(rate ‖ base) in nats, 0 where the rate is below the base."""
    off = 1 - rate
    part = np.where(off > 0, off * np.log(np.where(off > 0, off, 1) / (1 - base)), 0)
    return np.where(rate > base, n * (rate * np.log(rate / base) + part), 0.0)


def _means(
    codes: Sequence[Codes],
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Each text's mean activation of what fires in it: (text, feature, mean), [nnz] each."""
    texts, features, means = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for text, one in enumerate(codes):
        names, which = np.unique(_array(one.latents), return_inverse=True)
        texts.append(np.full(len(names), text))
        features.append(names)
        means.append(np.bincount(which, _array(one.values), len(names)) / max(1, one.n_rows))
    return np.concatenate(texts), np.concatenate(features), np.concatenate(means)


def _moments(
    which: NDArray[np.int64], values: Floats, n: int, n_features: int
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Of each feature over n texts: mean, sum of squares about it, and in how many it fires."""
    fires = np.bincount(which, minlength=n_features)
    mean = np.bincount(which, values, n_features) / n
    about = np.bincount(which, (values - mean[which]) ** 2, n_features)
    return mean, about + (n - fires) * mean**2, fires


def _array(tensor: Any) -> NDArray[Any]:
    found: NDArray[Any] = tensor.detach().cpu().numpy()
    return found.astype(np.float64) if found.dtype.kind == "f" else found
