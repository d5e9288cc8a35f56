"""Histograms of activations whose scale isn't known beforehand: bins that double."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 32
TENTHS = 10
# The exponent of a feature that never fired: below that of any activation.
_NONE = -(2**15)


@dataclass
class Histograms:
    """Of each feature, how many of its activations fall into each 32nd of [0, 2^exponent).

    counts [d_sae, BINS] uint32; exponents [d_sae] int16: of the lowest power of two above the
    feature's highest activation. When that grows, neighbouring bins are added together, so that
    the histogram is the same whatever came first, and merging is exact.
    """

    counts: NDArray[np.uint32]
    exponents: NDArray[np.int16]

    @classmethod
    def empty(cls, d_sae: int) -> "Histograms":
        return cls(np.zeros((d_sae, BINS), np.uint32), np.full(d_sae, _NONE, np.int16))

    def add(
        self,
        which: NDArray[np.int64],
        starts: NDArray[np.int64],
        values: NDArray[np.float32],
    ) -> None:
        """Take in, in place, activations [nnz] > 0 sorted by feature.

        which [m]: the features; starts [m]: where in `values` those of each begin.
        """
        exponents = np.frexp(np.maximum.reduceat(values, starts))[1]
        self._grow(which, exponents.astype(np.int16))
        sizes = np.diff(starts, append=len(values))
        shift = np.repeat(5 - self.exponents[which].astype(np.int32), sizes)
        # Scaling by a power of two is exact, so a value always falls into the same bin.
        bins = np.ldexp(values.astype(np.float64), shift).astype(np.int64)
        places = np.repeat(np.arange(len(which)) * BINS, sizes)
        found = np.bincount(places + bins, minlength=len(which) * BINS)
        self.counts[which] += found.reshape(-1, BINS).astype(np.uint32)

    def absorb(self, other: "Histograms") -> None:
        """Take in other histograms of the same features, in place."""
        every = np.arange(len(self.counts))
        self._grow(every, other.exponents)
        shift = self.exponents.astype(np.int32) - other.exponents
        self.counts += _coarser(other.counts, shift)

    def edges(self, features: NDArray[np.int64]) -> NDArray[np.float64]:
        """Where the bins of some features begin and end, [m, BINS + 1]; 0 for one that never fired.

        Every bin holds its lower edge and not its upper one.
        """
        # Of so low an exponent as stands for "never" it is 0.
        top = np.ldexp(1.0, self.exponents[features].astype(np.int32))
        return top[:, None] * (np.arange(BINS + 1) / BINS)

    def tenths(self, features: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.int64]:
        """In which tenth of its feature's activations each value lies, from 0 to 9 (highest), [n].

        Within a bin activations are taken to be spread evenly.
        """
        counts = self.counts[features].astype(np.float64)
        place = np.ldexp(values.astype(np.float64), 5 - self.exponents[features].astype(np.int32))
        whole = np.minimum(place.astype(np.int64), BINS - 1)
        line = np.arange(len(values))
        below = np.cumsum(counts, axis=1)[line, whole] - (1 - (place - whole)) * counts[line, whole]
        total = counts.sum(axis=1)
        return np.minimum((TENTHS * below / total).astype(np.int64), TENTHS - 1)

    def _grow(self, which: NDArray[np.int64], exponents: NDArray[np.int16]) -> None:
        grown = np.flatnonzero(exponents > self.exponents[which])
        rows = which[grown]
        shift = exponents[grown].astype(np.int32) - self.exponents[rows]
        self.counts[rows] = _coarser(self.counts[rows], shift)
        self.exponents[rows] = exponents[grown]


def _coarser(counts: NDArray[np.uint32], shift: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Counts [m, BINS] with bins 2^shift [m] times as wide."""
    counts = counts.copy()
    # After five doublings everything lies in the first bin.
    for step in range(1, BINS.bit_length()):
        rows = np.flatnonzero(shift >= step)
        if len(rows) == 0:
            break
        half = counts[rows].reshape(len(rows), BINS // 2, 2).sum(-1, dtype=np.uint32)
        counts[rows] = np.concatenate([half, np.zeros_like(half)], 1)
    return counts
