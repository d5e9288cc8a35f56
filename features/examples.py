"""The firings of each feature that are kept, with the tokens around them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saesteer.features.tally import rank_in_group

# What stands in a window where there is no token: before a document's start or after its end.
NO_TOKEN = -1
# An activation in a window is kept in so many steps of the highest one there.
_LEVELS = 255
# Features and windows worked on at a time: what bounds the memory of a merge.
_FEATURES, _WINDOWS = 2**15, 2**16


@dataclass(frozen=True)
class Window:
    """How many tokens are kept before and after the one that fires."""

    before: int = 12
    after: int = 8

    @property
    def size(self) -> int:
        return self.before + 1 + self.after


class Packed(NamedTuple):
    """Windows as they are kept.

    codes [m, window]: token id + 1, 0 for none; levels [m, window] uint8: activations in 255ths
    of the highest of the window, rounded up, so that 0 means that the feature doesn't fire there;
    peaks [m]: that highest activation.
    """

    codes: NDArray[np.unsignedinteger]
    levels: NDArray[np.uint8]
    peaks: NDArray[np.float32]


class Firings(NamedTuple):
    """Candidates for examples: firings [n], and what gives the windows of chosen ones [k]."""

    features: NDArray[np.int64]
    values: NDArray[np.float32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    positions: NDArray[np.int32]
    windows: Callable[[NDArray[np.int64]], Packed]


class Rows(NamedTuple):
    """Examples of m features, strongest first; see `Examples.rows`."""

    values: NDArray[np.float32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    positions: NDArray[np.int32]
    tokens: NDArray[np.int32]
    activations: NDArray[np.float32]


# Which firings stay, ordered by feature: features, values, documents, contexts, positions, n.
Choice = Callable[
    [
        NDArray[np.int64],
        NDArray[np.float32],
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int32],
        int,
    ],
    NDArray[np.int64],
]


@dataclass
class Examples:
    """At most n firings of each feature, chosen by a rule that doesn't depend on the order.

    values, documents, contexts, positions [d_sae, n]: activation (0 where there are fewer than
    n), document, context and position in it; codes, levels [d_sae, n, window], peaks [d_sae, n]:
    the windows, packed; before: where in a window the token stands that fires. Entries of a
    feature are in no order before `sort`. Zeros are not touched, so that a feature that never
    fires takes next to no memory.
    """

    before: int
    values: NDArray[np.float32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    positions: NDArray[np.int32]
    codes: NDArray[np.unsignedinteger]
    levels: NDArray[np.uint8]
    peaks: NDArray[np.float32]

    @classmethod
    def empty(cls, d_sae: int, n: int, window: Window, vocab_size: int) -> "Examples":
        return cls(
            window.before,
            np.zeros((d_sae, n), np.float32),
            np.zeros((d_sae, n), np.int64),
            np.zeros((d_sae, n), np.int64),
            np.zeros((d_sae, n), np.int32),
            np.zeros((d_sae, n, window.size), _code(vocab_size)),
            np.zeros((d_sae, n, window.size), np.uint8),
            np.zeros((d_sae, n), np.float32),
        )

    def rows(self, features: NDArray[np.int64]) -> Rows:
        """The examples of some features [m], unpacked: ask for as many as memory has room for.

        Returns:
            values, documents, contexts, positions [m, n] as above, −1 for the last three where
            there is no example; tokens [m, n, window]: the tokens around (NO_TOKEN outside the
            document); activations [m, n, window]: this feature's on them, that at `before` exact.
        """
        values = self.values[features]
        activations = self.levels[features].astype(np.float32) / np.float32(_LEVELS)
        activations *= self.peaks[features][..., None]
        activations[..., self.before] = values
        return Rows(
            values,
            np.where(values > 0, self.documents[features], -1),
            np.where(values > 0, self.contexts[features], -1),
            np.where(values > 0, self.positions[features], -1).astype(np.int32),
            self.codes[features].astype(np.int32) - 1,
            activations,
        )

    def absorb(self, new: Firings, choose: Choice) -> None:
        """Take in, in place, those of the candidates that `choose` prefers."""
        order = np.argsort(new.features, kind="stable")
        which, starts = np.unique(new.features[order], return_index=True)
        ends = np.append(starts, len(order))
        for i in range(0, len(which), _FEATURES):
            part = which[i : i + _FEATURES]
            self._absorb(new, part, order[starts[i] : ends[i + len(part)]], choose)

    def firings(self) -> Iterator[Firings]:
        """All that is kept, as candidates, some features at a time."""
        for start in range(0, len(self.values), _FEATURES):
            places, slots = np.nonzero(self.values[start : start + _FEATURES])
            places += start
            yield Firings(
                places,
                self.values[places, slots],
                self.documents[places, slots],
                self.contexts[places, slots],
                self.positions[places, slots],
                partial(self._packed, places, slots),
            )

    def sort(self) -> None:
        """Put each feature's examples in order, strongest first, ties by place in the text."""
        several = np.flatnonzero(np.count_nonzero(self.values, 1) > 1)
        for start in range(0, len(several), _FEATURES):
            part = several[start : start + _FEATURES]
            order = np.lexsort((self.positions[part], self.contexts[part], -self.values[part]))
            for array in (self.values, self.documents, self.contexts, self.positions, self.peaks):
                array[part] = np.take_along_axis(array[part], order, 1)
            order = order[..., None]
            self.codes[part] = np.take_along_axis(self.codes[part], order, 1)
            self.levels[part] = np.take_along_axis(self.levels[part], order, 1)

    def _packed(
        self, features: NDArray[np.int64], slots: NDArray[np.int64], chosen: NDArray[np.int64]
    ) -> Packed:
        at = features[chosen], slots[chosen]
        return Packed(self.codes[at], self.levels[at], self.peaks[at])

    def _absorb(
        self,
        new: Firings,
        which: NDArray[np.int64],
        own: NDArray[np.int64],
        choose: Choice,
    ) -> None:
        """`absorb` of the candidates `own`, which are those of the features `which`."""
        n = self.values.shape[1]
        places, slots = np.nonzero(self.values[which])
        at = which[places], slots
        features = np.concatenate([at[0], new.features[own]])
        kept = choose(
            features,
            np.concatenate([self.values[at], new.values[own]]),
            np.concatenate([self.documents[at], new.documents[own]]),
            np.concatenate([self.contexts[at], new.contexts[own]]),
            np.concatenate([self.positions[at], new.positions[own]]),
            n,
        )
        # What stays keeps its slot; what is let in takes those that are free, in turn. They are
        # enough: a feature never has fewer examples than before.
        stays, enters = kept[kept < len(slots)], kept[kept >= len(slots)]
        taken = np.zeros((len(which), n), bool)
        taken[places[stays], slots[stays]] = True
        free = np.argsort(taken, axis=1, kind="stable")
        place = np.searchsorted(which, features[enters])
        slot = free[place, rank_in_group(place)]
        row, source = which[place], own[enters - len(slots)]
        self.values[row, slot] = new.values[source]
        self.documents[row, slot] = new.documents[source]
        self.contexts[row, slot] = new.contexts[source]
        self.positions[row, slot] = new.positions[source]
        for i in range(0, len(source), _WINDOWS):
            part = slice(i, i + _WINDOWS)
            to = row[part], slot[part]
            self.codes[to], self.levels[to], self.peaks[to] = new.windows(source[part])


def strongest(
    features: NDArray[np.int64],
    values: NDArray[np.float32],
    documents: NDArray[np.int64],
    contexts: NDArray[np.int64],
    positions: NDArray[np.int32],
    n: int,
) -> NDArray[np.int64]:
    """Which firings are each feature's n strongest, one a document, ordered by feature.

    Of equal ones the earlier token is taken, so that the order of merging doesn't matter.
    """
    # One number instead of two sorts: positive floats are in the order of their bits.
    weakness = 2**32 - 1 - values.view(np.uint32).astype(np.int64)
    order = np.lexsort(((contexts << 24) | positions, (features << 32) | weakness))
    features, documents = features[order], documents[order]
    # A document's firings next to one another, the best first: the others are repeats.
    near = np.lexsort((documents, features))
    first = np.ones(len(order), bool)
    first[near[1:]] = (np.diff(features[near]) != 0) | (np.diff(documents[near]) != 0)
    order, features = order[first], features[first]
    return order[rank_in_group(features) < n]


def packed(tokens: NDArray[np.int32], activations: NDArray[np.float32], vocab_size: int) -> Packed:
    """Windows [m, window] of token ids (NO_TOKEN for none) and activations, packed."""
    peaks = activations.max(1)
    levels = np.ceil(activations * (_LEVELS / peaks.astype(np.float64))[:, None])
    # Rounding in the quotient may lift the peak itself over the last level.
    levels = np.minimum(levels, _LEVELS).astype(np.uint8)
    return Packed((tokens + 1).astype(_code(vocab_size)), levels, peaks)


def _code(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type with room for every token's id + 1."""
    return np.uint16 if vocab_size < 2**16 else np.uint32
