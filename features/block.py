"""A stretch of the stream of activations, encoded: what the statistics are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saesteer.features.examples import NO_TOKEN, Firings, Packed, Window, packed


@dataclass(frozen=True)
class Block:
    """Contexts of one length with what fired in them; special tokens have no firing.

    tokens [contexts, s]; documents [contexts, s]; words, begins [contexts, s]: see
    `words_in.Occurrences`; contexts [contexts]: their numbers; rows, features, values [nnz]:
    firings ordered by row (a position in the flattened block), then by feature.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int64]
    words: NDArray[np.int64]
    begins: NDArray[np.bool_]
    contexts: NDArray[np.int64]
    rows: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def joined(cls, blocks: Sequence["Block"]) -> "Block":
        """One block of several with contexts of the same length."""
        starts = np.cumsum([0, *(block.tokens.size for block in blocks)])
        rows = [block.rows + start for block, start in zip(blocks, starts, strict=False)]
        names = ("tokens", "documents", "words", "begins", "contexts", "features", "values")
        return cls(
            rows=np.concatenate(rows),
            **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in names},
        )

    def firings(self, chosen: NDArray[np.int64], window: Window, vocab_size: int) -> Firings:
        """The firings `chosen` [n], as candidates for examples."""
        rows = self.rows[chosen]
        context, position = np.divmod(rows, self.tokens.shape[1])
        return Firings(
            self.features[chosen],
            self.values[chosen],
            self.documents.reshape(-1)[rows],
            self.contexts[context],
            position.astype(np.int32),
            lambda some: self._windows(chosen[some], window, vocab_size),
        )

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        """One sorted number a firing: firings are ordered by row, then feature."""
        return self.rows * self._n_features + self.features

    @cached_property
    def _n_features(self) -> int:
        return int(self.features.max(initial=0)) + 1

    def _windows(self, chosen: NDArray[np.int64], window: Window, vocab_size: int) -> Packed:
        """The tokens and activations around each firing [m], within its document."""
        length = self.tokens.shape[1]
        # In the order of the rows: bisection then finds its pages in the processor's cache.
        by_row = np.argsort(chosen)
        rows, features = self.rows[chosen[by_row]], self.features[chosen[by_row]]
        offsets = np.arange(-window.before, window.after + 1)
        positions = (rows % length)[:, None] + offsets
        near = np.clip(rows[:, None] + offsets, 0, self.tokens.size - 1)
        documents = self.documents.reshape(-1)
        inside = (positions >= 0) & (positions < length)
        inside &= documents[near] == documents[rows][:, None]
        tokens = np.where(inside, self.tokens.reshape(-1)[near], NO_TOKEN)
        wanted = near * self._n_features + features[:, None]
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found = inside & (self._keys[at] == wanted)
        activations = np.where(found, self.values[at], 0)
        back = np.argsort(by_row)
        return packed(tokens[back], activations[back], vocab_size)
