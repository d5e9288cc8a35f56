"""The contexts in which each feature fires most, one a document, with the tokens around."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.features.tally import rank_in_group

# What stands in a window where there is no token: before a document's start or after its end.
NO_TOKEN = -1


@dataclass(frozen=True)
class Window:
    """How many tokens are kept before and after the one that fires."""

    before: int = 12
    after: int = 8

    @property
    def size(self) -> int:
        return self.before + 1 + self.after


@dataclass(frozen=True)
class Block:
    """A stretch of the stream with what fired in it; special tokens have no firing.

    tokens, documents [contexts, s]; contexts [contexts]: their numbers; rows, features, values
    [nnz]: firings ordered by row (a position in the flattened block), then by feature.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    rows: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Examples:
    """The highest activations of some features, one a document, strongest first.

    features [m]: which; values, documents, contexts, positions [m, n]: activation (0 where there
    are fewer than n), document, context and position in it; tokens, activations [m, n, window]:
    the tokens around (NO_TOKEN outside the document) and this feature's activations on them. Ties
    go to the earlier token, so that the order of merging doesn't matter.
    """

    features: NDArray[np.int64]
    values: NDArray[np.float32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    positions: NDArray[np.int32]
    tokens: NDArray[np.int32]
    activations: NDArray[np.float32]

    @classmethod
    def empty(cls, features: NDArray[np.int64], n: int, window: int) -> "Examples":
        m = len(features)
        return cls(
            features,
            np.zeros((m, n), np.float32),
            np.full((m, n), -1, np.int64),
            np.full((m, n), -1, np.int64),
            np.full((m, n), -1, np.int32),
            np.full((m, n, window), NO_TOKEN, np.int32),
            np.zeros((m, n, window), np.float32),
        )

    @classmethod
    def of(
        cls, block: Block, *, n: int, window: Window, d_sae: int, floor: NDArray[np.float32]
    ) -> "Examples":
        """A block's examples above `floor` [d_sae], of the features that have any."""
        above = block.values > floor[block.features]
        rows, features, values = block.rows[above], block.features[above], block.values[above]
        documents = block.documents.reshape(-1)[rows]
        # Each document's strongest token for each feature, then each feature's n strongest.
        order = np.lexsort((rows, -values, documents, features))
        same = (np.diff(features[order]) == 0) & (np.diff(documents[order]) == 0)
        order = order[np.concatenate([[True], ~same])[: len(order)]]
        order = order[np.lexsort((rows[order], -values[order], features[order]))]
        rank = rank_in_group(features[order])
        order, rank = order[rank < n], rank[rank < n]
        which, place = np.unique(features[order], return_inverse=True)
        part = cls.empty(which, n, window.size)
        length = block.tokens.shape[1]
        part.values[place, rank] = values[order]
        part.documents[place, rank] = documents[order]
        part.contexts[place, rank] = block.contexts[rows[order] // length]
        part.positions[place, rank] = rows[order] % length
        # In the order of the rows: bisection then finds its pages in the processor's cache.
        by_row = np.argsort(rows[order])
        order, place, rank = order[by_row], place[by_row], rank[by_row]
        tokens, activations = _around(block, rows[order], features[order], window, d_sae)
        part.tokens[place, rank] = tokens
        part.activations[place, rank] = activations
        return part

    def copy(self) -> "Examples":
        return Examples(*(array.copy() for array in vars(self).values()))

    def absorb(self, part: "Examples") -> None:
        """Take in, in place, the examples of `part`; `self` must have all features, in order."""
        which, n = part.features, self.values.shape[1]
        if len(which) == 0:
            return
        names = ("values", "documents", "contexts", "positions", "tokens", "activations")
        both = {k: np.concatenate([getattr(self, k)[which], getattr(part, k)], 1) for k in names}
        best = np.lexsort((both["positions"], both["contexts"], -both["values"]), axis=-1)
        documents = np.take_along_axis(both["documents"], best, 1)
        # In each row the same document next to itself, strongest first: the others are repeats.
        near = np.argsort(documents, axis=1, kind="stable")
        grouped = np.take_along_axis(documents, near, 1)
        repeats = np.zeros_like(grouped, dtype=bool)
        repeats[:, 1:] = (grouped[:, 1:] == grouped[:, :-1]) & (grouped[:, 1:] != -1)
        repeated = np.zeros_like(repeats)
        np.put_along_axis(repeated, near, repeats, 1)
        first = np.argsort(repeated, axis=1, kind="stable")[:, :n]
        chosen = np.take_along_axis(best, first, 1)
        line = np.arange(len(which))[:, None]
        short = np.take_along_axis(repeated, first, 1)
        for name in names:
            taken = both[name][line, chosen]
            taken[short] = 0 if name in ("values", "activations") else -1
            getattr(self, name)[which] = taken


def _around(
    block: Block,
    rows: NDArray[np.int64],
    features: NDArray[np.int64],
    window: Window,
    d_sae: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens and activations [m, window] around each of `rows` [m], within its document."""
    length = block.tokens.shape[1]
    offsets = np.arange(-window.before, window.after + 1)
    positions = (rows % length)[:, None] + offsets
    near = np.clip(rows[:, None] + offsets, 0, block.tokens.size - 1)
    documents = block.documents.reshape(-1)
    inside = (positions >= 0) & (positions < length)
    inside &= documents[near] == documents[rows][:, None]
    tokens = np.where(inside, block.tokens.reshape(-1)[near], NO_TOKEN)
    # Firings are ordered by row, then feature: the pair is found by bisection.
    fired = block.rows * d_sae + block.features
    wanted = near * d_sae + features[:, None]
    at = np.minimum(np.searchsorted(fired, wanted), len(fired) - 1)
    found = inside & (fired[at] == wanted)
    return tokens.astype(np.int32), np.where(found, block.values[at], 0).astype(np.float32)
