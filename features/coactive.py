"""Which features fire on the same tokens: counted on a fair sample of the tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from saesteer.features.tally import rank_in_group

# What a sample holds at most: a token costs 1, and 1 for each feature that fires on it.
_MOST = 2**21
# Pairs of firings on one token looked at: all of them, and at a time.
_PAIRS, _PAIRS_AT_ONCE = 2**27, 2**23
_LAST = np.uint64(2**64 - 1)


@dataclass
class TokenSample:
    """The tokens with the smallest hashes, and which features fire on each.

    keys [t] uint64: the tokens' hashes; sizes [t]: how many features fire on each; features
    [sum of sizes]: which, token by token; below [1] uint64: hashes from this on are left out. The
    sample is all tokens of the stream with a hash below that, so that it is the same however the
    stream was cut, once it was cut to size by `settle`.
    """

    keys: NDArray[np.uint64]
    sizes: NDArray[np.int32]
    features: NDArray[np.int32]
    below: NDArray[np.uint64]

    @classmethod
    def empty(cls) -> "TokenSample":
        none = np.zeros(0, np.int32)
        return cls(np.zeros(0, np.uint64), none, none, np.array([_LAST]))

    def add(
        self, keys: NDArray[np.uint64], sizes: NDArray[np.int32], features: NDArray[np.int32]
    ) -> None:
        """Take in tokens, in place; as the attributes."""
        low = keys < self.below
        self.keys = np.concatenate([self.keys, keys[low]])
        self.sizes = np.concatenate([self.sizes, sizes[low]])
        self.features = np.concatenate([self.features, features[np.repeat(low, sizes)]])
        # Seldom, as it moves everything.
        if 2 * (len(self.keys) + len(self.features)) > 3 * _MOST:
            self.settle()

    def absorb(self, other: "TokenSample") -> None:
        """Take in another sample, in place."""
        self.below = np.minimum(self.below, other.below)
        self.add(other.keys, other.sizes, other.features)
        self.settle()

    def settle(self) -> None:
        """Put the tokens in the order of their hashes and keep as many as there is room for."""
        order = np.argsort(self.keys)
        keys, sizes = self.keys[order], self.sizes[order]
        kept = np.cumsum(sizes + 1, dtype=np.int64) <= _MOST
        # Once one doesn't fit, no later one may, however small: else the order would matter.
        if not kept.all():
            self.below = np.minimum(self.below, keys[[np.argmin(kept)]])
        kept &= keys < self.below
        ends = np.cumsum(self.sizes, dtype=np.int32)
        starts = (ends - self.sizes)[order][kept]
        self.keys, self.sizes = keys[kept], sizes[kept]
        ends = np.cumsum(self.sizes, dtype=np.int32)
        chosen = np.repeat(starts - (ends - self.sizes), self.sizes)
        chosen += np.arange(len(chosen), dtype=np.int32)
        self.features = self.features[chosen]


class Partners(NamedTuple):
    """For each feature those that fire with it, the most telling first.

    features [d_sae, most] int32, −1 where there are fewer; lift [d_sae, most]: how many times
    more often both fire on one token than if they had nothing to do with each other; n [d_sae,
    most] int32: tokens of the sample on which both fire.
    """

    features: NDArray[np.int32]
    lift: NDArray[np.float32]
    n: NDArray[np.int32]


def partners(sample: TokenSample, d_sae: int, *, most: int = 10, least: int = 5) -> Partners:
    """The features that fire together more often than by chance.

    Ranked by log-likelihood ratio (Dunning 1993), so that neither the frequent nor the rare come
    first just for that. A feature so rare that it fires on under `least` tokens of the sample
    (about 65,000 at 32 firings a token) has none.

    Args:
        sample: settled.
        most: partners a feature.
        least: tokens of the sample on which both must fire.
    """
    cost = np.cumsum(sample.sizes.astype(np.int64) ** 2)
    n_tokens = int(np.searchsorted(cost, _PAIRS, side="right"))
    ends = np.cumsum(sample.sizes[:n_tokens], dtype=np.int64)
    starts = np.append(0, ends)
    features = sample.features[: starts[-1]]
    fires = csr_matrix(
        (np.ones(len(features), np.int32), features, starts), shape=(n_tokens, d_sae)
    )
    by_feature = fires.T.tocsr()
    fired = np.diff(by_feature.indptr).astype(np.int64)
    found = Partners(
        np.full((d_sae, most), -1, np.int32),
        np.zeros((d_sae, most), np.float32),
        np.zeros((d_sae, most), np.int32),
    )
    pairs = np.bincount(features, np.repeat(sample.sizes[:n_tokens], np.diff(starts)), d_sae)
    # A cut wherever the pairs pass another multiple of what is looked at at a time.
    chunk = np.cumsum(pairs).astype(np.int64) // _PAIRS_AT_ONCE
    cuts = np.flatnonzero(np.diff(chunk, prepend=-1, append=chunk[-1] + 1))
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        both = (by_feature[first:last] @ fires).tocoo()
        seen = (both.data >= least) & (both.row + first != both.col)
        row, other, n = both.row[seen] + first, both.col[seen], both.data[seen].astype(np.int64)
        lift = n * n_tokens / (fired[row] * fired[other])
        above = lift > 1
        row, other, n, lift = row[above], other[above], n[above], lift[above]
        ratio = _likelihood_ratio(n, fired[row], fired[other], n_tokens)
        order = np.lexsort((other, -ratio, row))
        rank = rank_in_group(row[order].astype(np.int64))
        order, rank = order[rank < most], rank[rank < most]
        at = row[order], rank
        found.features[at], found.lift[at], found.n[at] = other[order], lift[order], n[order]
    return found


def _likelihood_ratio(
    both: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64], n: int
) -> NDArray[np.float64]:
    """How much likelier the counts are of two features that depend on each other; all [m].

    The mutual information of two yes-or-no events, in nats, times n tokens.
    """
    total = np.zeros(len(both))
    for seen, a, b in (
        (both, one, other),
        (one - both, one, n - other),
        (other - both, n - one, other),
        (n - one - other + both, n - one, n - other),
    ):
        # Where none was seen the term is 0.
        there = seen > 0
        total[there] += seen[there] * np.log(seen[there] * n / (a[there] * b[there].astype(float)))
    return total
