"""How often, and how strongly, each feature fires on each token: sorted sparse arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Pairs of (feature, token) kept before pruning: 24 bytes each, so about 100 MB.
_PAIRS = 2**22
# Tokens a feature keeps, at the least, when its pairs are pruned.
_KEPT = 64


@dataclass(frozen=True)
class TokenTally:
    """Counts and activation mass of the (feature, token) pairs that occurred.

    keys [m] int64, sorted: feature * vocab_size + token; counts [m] int64: tokens on which the
    feature fired; mass [m] float64: the sum of its activations there.

    Memory is bounded: over `limit` pairs, each feature keeps its heaviest `limit / (2 d_sae)`
    tokens (at least 64) and the rest are forgotten. What is kept stays a lower bound, and is exact
    for a token that was among the kept at every pruning, as every token that matters to a feature
    is: a feature seldom has 64 of those.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    mass: NDArray[np.float64]
    d_sae: int
    vocab_size: int

    @classmethod
    def empty(cls, d_sae: int, vocab_size: int) -> "TokenTally":
        none = np.zeros(0, np.int64)
        return cls(none, none, np.zeros(0), d_sae, vocab_size)

    @classmethod
    def of(
        cls,
        features: NDArray[np.int64],
        tokens: NDArray[np.int64],
        values: NDArray[np.float32],
        *,
        d_sae: int,
        vocab_size: int,
    ) -> "TokenTally":
        """Tally of single firings: features [nnz], tokens [nnz], values [nnz]."""
        keys = features * vocab_size + tokens
        return cls._added(keys, np.ones(len(keys), np.int64), values, d_sae, vocab_size)

    def merge(self, other: "TokenTally") -> "TokenTally":
        """The tally of both; associative as long as neither was pruned."""
        merged = self._added(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.mass, other.mass]),
            self.d_sae,
            self.vocab_size,
        )
        limit = max(_PAIRS, 2 * _KEPT * self.d_sae)
        return merged if len(merged.keys) <= limit else merged.pruned(limit // (2 * self.d_sae))

    def pruned(self, keep: int) -> "TokenTally":
        """Each feature's `keep` heaviest tokens."""
        order, rank = self.heaviest_first()
        kept = np.sort(order[rank < keep])
        return TokenTally(
            self.keys[kept], self.counts[kept], self.mass[kept], self.d_sae, self.vocab_size
        )

    def heaviest_first(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices into the pairs, feature by feature, heaviest first; and each one's rank there."""
        features = self.keys // self.vocab_size
        order = np.lexsort((self.keys, -self.mass, features))
        return order, rank_in_group(features[order])

    @classmethod
    def _added(
        cls,
        keys: NDArray[np.int64],
        counts: NDArray[np.int64],
        mass: NDArray[np.floating],
        d_sae: int,
        vocab_size: int,
    ) -> "TokenTally":
        if len(keys) == 0:
            return cls.empty(d_sae, vocab_size)
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return cls(
            keys[starts],
            np.add.reduceat(counts[order], starts),
            np.add.reduceat(mass[order].astype(np.float64), starts),
            d_sae,
            vocab_size,
        )


def rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, … within each run of equal values of `groups` [n]."""
    index = np.arange(len(groups))
    first = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(groups)]
    return index - np.maximum.accumulate(np.where(first, index, 0))
