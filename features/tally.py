"""How often, and how strongly, each feature fires on each token: sorted sparse arrays."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Pairs of (feature, token) kept before pruning, 24 bytes each: so many a feature, within bounds.
_PAIRS_A_FEATURE, _LEAST_PAIRS, _MOST_PAIRS = 128, 2**22, 2**25
# Pairs that wait at most, before they are sorted in.
_WAITING = 2**22
# A unit of activation mass. Sums of whole units don't depend on the order of summing.
UNIT = 2.0**-20


# Keys, sorted; counts; mass.
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass
class TokenTally:
    """Counts and activation mass of the (feature, token) pairs that occurred.

    keys [m] int64, sorted: feature * vocab_size + token; counts [m] int64: tokens on which the
    feature fired; mass [m] int64: the sum of its activations there, in units of 2^-20; slack
    [d_sae] int64: what a token's mass can lack at most, 0 where the feature's pairs are exact.

    Memory is bounded. Over `most` pairs, 128 a feature where there are under 2^18 of them, each
    feature keeps the `keep` heaviest tokens, half the limit, and loses from each the mass of the
    next one, which is added to its slack (Misra and Gries 1982; merging as Agarwal et al. 2012,
    "Mergeable summaries"). So a token's mass is low by at most the slack, whatever was merged in
    whatever order; the slack is at most 1 / (keep + 1) of the feature's mass; and no token with
    more than that is missing. Counts are those seen since a token was last let in. What was added
    waits in `waiting` until there is much of it, or until `settle`: call that before reading.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    mass: NDArray[np.int64]
    slack: NDArray[np.int64]
    vocab_size: int
    most: int
    waiting: list[Pairs] = field(default_factory=list)

    @property
    def d_sae(self) -> int:
        return len(self.slack)

    @classmethod
    def empty(cls, d_sae: int, vocab_size: int, most: int | None = None) -> "TokenTally":
        none = np.zeros(0, np.int64)
        most = most or min(max(_PAIRS_A_FEATURE * d_sae, _LEAST_PAIRS), _MOST_PAIRS)
        return cls(none, none, none, np.zeros(d_sae, np.int64), vocab_size, most)

    def add(self, keys: NDArray[np.int64], mass: NDArray[np.int64]) -> None:
        """Take in single firings [nnz], their keys sorted, in place."""
        self._wait(_summed(keys, None, mass))

    def absorb(self, other: "TokenTally") -> None:
        """Take in another tally, in place: the order of merging doesn't matter up to the slack."""
        self.slack += other.slack
        for pairs in ((other.keys, other.counts, other.mass), *other.waiting):
            self._wait(pairs)

    def settle(self) -> None:
        """Sort in what waits."""
        if not self.waiting:
            return
        keys, counts, mass = (
            np.concatenate(parts)
            for parts in zip((self.keys, self.counts, self.mass), *self.waiting, strict=True)
        )
        self.waiting = []
        # Sorted runs: a stable sort merges them without sorting each again.
        order = np.argsort(keys, kind="stable")
        self.keys, self.counts, self.mass = _summed(keys[order], counts[order], mass[order])
        if len(self.keys) > self.most:
            self._prune(max(1, self.most // (2 * self.d_sae)))

    def heaviest_first(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices into the pairs, feature by feature, heaviest first; and each one's rank there."""
        features = self.keys // self.vocab_size
        order = np.lexsort((self.keys, -self.mass, features))
        return order, rank_in_group(features[order])

    def _wait(self, pairs: Pairs) -> None:
        self.waiting.append(pairs)
        # Sorting in moves every pair: it must be rarer the more there are.
        if sum(len(keys) for keys, *_ in self.waiting) > min(len(self.keys) // 2, _WAITING):
            self.settle()

    def _prune(self, keep: int) -> None:
        order, rank = self.heaviest_first()
        next_one = order[rank == keep]
        lost = np.zeros(self.d_sae, np.int64)
        lost[self.keys[next_one] // self.vocab_size] = self.mass[next_one]
        self.slack += lost
        left = self.mass - lost[self.keys // self.vocab_size]
        kept = np.sort(order[(rank < keep) & (left[order] > 0)])
        self.keys, self.counts, self.mass = self.keys[kept], self.counts[kept], left[kept]


def _summed(
    keys: NDArray[np.int64], counts: NDArray[np.int64] | None, mass: NDArray[np.int64]
) -> Pairs:
    """Sums over equal `keys`, which are sorted; without `counts` each entry counts once."""
    if len(keys) == 0:
        none = np.zeros(0, np.int64)
        return none, none, none
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    summed = (
        np.diff(starts, append=len(keys)) if counts is None else np.add.reduceat(counts, starts)
    )
    return keys[starts], summed, np.add.reduceat(mass, starts)


def rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, … within each run of equal values of `groups` [n]."""
    index = np.arange(len(groups))
    first = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(groups)]
    return index - np.maximum.accumulate(np.where(first, index, 0))
