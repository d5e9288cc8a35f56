"""The whole words that features fire on, from the tokens they fire on: many features at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.features.tally import rank_in_group
from saesteer.features.words_in import NONE, Lexicon, Windows

# Words that belong to a feature: they occur this many times more often where it fires.
OWN_LIFT = 2.0


@dataclass(frozen=True)
class Parts:
    """What words tokens were seen as part of, and how much.

    keys [k], sorted: the token, or feature * vocab_size + token; words [k]: the number of a word;
    weights [k]: how often, or with how much activation. In each key's run the word seen first
    stands first.
    """

    keys: NDArray[np.int64]
    words: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(
        cls, keys: NDArray[np.int64], words: NDArray[np.int64], weights: NDArray[np.floating]
    ) -> "Parts":
        """Summed over the same key and word; all [n]."""
        first, group = _first_seen(keys, words)
        order = np.lexsort((first, keys[first]))
        sums = _sums(group, weights, len(first))
        return cls(keys[first[order]], words[first[order]], sums[order])

    def find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where the run of each key begins and ends, [n] each."""
        return np.searchsorted(self.keys, keys), np.searchsorted(self.keys, keys, "right")


def completions(windows: Windows) -> Parts:
    """What words tokens are part of, over many windows, by token.

    The last token of each window is left out, since its word may be cut off there.
    """
    inside = windows.ids != NONE
    inside[:, :-1] &= inside[:, 1:]
    inside[:, -1] = False
    return Parts.of(windows.ids[inside], windows.words[inside], np.ones(inside.sum()))


@dataclass(frozen=True)
class Tokens:
    """Tokens on which features fire, [k] each: the feature's row, the token, its share of the
    feature's activation mass, its lift, its base rate; each row's heaviest first."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    share: NDArray[np.float64]
    lift: NDArray[np.float64]
    base: NDArray[np.float64]


@dataclass(frozen=True)
class Words:
    """Whole words on which features fire, [k] each: the feature's row, the number of the word as
    mostly spelled and of its key (casefolded), share, lift and base rate as of `Tokens`."""

    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    keys: NDArray[np.int64]
    share: NDArray[np.float64]
    lift: NDArray[np.float64]
    base: NDArray[np.float64]


def firing_words(
    tokens: Tokens,
    windows: Windows,
    rows: NDArray[np.int64],
    activations: NDArray[np.floating],
    seen: Parts,
    lexicon: Lexicon,
    *,
    most: int,
) -> Words:
    """The whole words each feature fires on, heaviest first; case and leading spaces are merged.

    A token that is a part of words is shared out among the words it was part of in the feature's
    own windows, by activation, else in all windows seen. A word's lift and recall are those of its
    tokens, weighted alike.

    Args:
        windows, rows [n], activations [n, w]: examples, the row of the feature of each, and its
            activations there.
        seen: `completions`, for tokens that are in none of a feature's own windows.
        most: words kept a feature.
    """
    on = activations > 0
    line = np.broadcast_to(rows[:, None], on.shape)[on]
    vocab_size = lexicon.vocab_size
    own = Parts.of(line * vocab_size + windows.ids[on], windows.words[on], activations[on])
    # Where each token's words are: among its feature's own, else among those of all windows, else
    # it is its own word.
    wanted = tokens.rows * vocab_size + tokens.ids
    n_own, n_seen = len(own.keys), len(seen.keys)
    (begin, end), (begin_all, end_all) = own.find(wanted), seen.find(tokens.ids)
    which = [end > begin, end_all > begin_all]
    itself = n_own + n_seen + np.arange(len(wanted))
    begin, end = (
        np.select(which, [among_own, n_own + among_all], alone)
        for among_own, among_all, alone in ((begin, begin_all, itself), (end, end_all, itself + 1))
    )
    texts = lexicon.texts(tokens.ids).tolist()
    alone = np.array([lexicon.number(text.strip() or text) for text in texts], np.int64)
    words = np.concatenate([own.words, seen.words, alone])
    weights = np.concatenate([own.weights, seen.weights, np.ones(len(alone))])
    # One line a (token, word): `slot` says which token.
    count = end - begin
    slot = np.repeat(np.arange(len(wanted)), count)
    at = np.arange(len(slot)) - np.repeat(np.cumsum(count) - count, count) + begin[slot]
    word, part = words[at], weights[at]
    part = part / _sums(slot, part, len(wanted))[slot]
    row, keys = tokens.rows[slot], lexicon.keys(word)
    share = part * tokens.share[slot]
    # Shares of the firings and of all tokens: their ratio is the lift.
    fires, base = part * (tokens.lift * tokens.base)[slot], part * tokens.base[slot]
    first, group = _first_seen(row, keys)
    shares, firing, bases = (_sums(group, v, len(first)) for v in (share, fires, base))
    spelled = _heaviest(group, word, share, len(first))
    order = np.lexsort((first, -shares, row[first]))
    order = order[rank_in_group(row[first[order]]) < most]
    lift = np.divide(firing, bases, out=np.zeros_like(bases), where=bases > 0)
    return Words(
        row[first[order]],
        spelled[order],
        keys[first[order]],
        shares[order],
        lift[order],
        bases[order],
    )


def company(
    words: Words,
    windows: Windows,
    rows: NDArray[np.int64],
    activations: NDArray[np.floating],
    lexicon: Lexicon,
    m: int,
) -> NDArray[np.float64]:
    """How many different own words a feature fires on within one example, on average, [m].

    About 1 for a feature of one word, and for one whose words have nothing to do with each other;
    more where they belong to one topic and so turn up together.
    """
    size = len(lexicon.words) + 1
    is_own = words.lift >= OWN_LIFT
    own = words.rows[is_own] * size + words.keys[is_own]
    on = activations > 0
    window = np.broadcast_to(np.arange(len(rows))[:, None], on.shape)[on]
    pairs = np.unique(window * size + lexicon.keys(windows.words[on]))
    window, key = np.divmod(pairs, size)
    together = np.isin(rows[window] * size + key, own)
    found = np.bincount(rows[window[together]], minlength=m)
    return found / np.maximum(1, np.bincount(rows, minlength=m))


def _first_seen(
    one: NDArray[np.int64], two: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each distinct pair, where it stands first; and for each position its pair's number."""
    size = int(two.max(initial=0)) + 1
    _, first, group = np.unique(one * size + two, return_index=True, return_inverse=True)
    return first, group


def _sums(group: NDArray[np.intp], weight: NDArray[np.floating], n: int) -> NDArray[np.float64]:
    """The sum of the weights of each of n groups."""
    return np.bincount(group, weight, minlength=n).astype(np.float64)


def _heaviest(
    group: NDArray[np.intp], word: NDArray[np.int64], weight: NDArray[np.float64], n: int
) -> NDArray[np.int64]:
    """Of each of n groups, the word of the largest summed weight; the first seen of equals."""
    first, pair = _first_seen(group, word)
    sums = _sums(pair, weight, len(first))
    order = np.lexsort((-first, sums, group[first]))
    found = np.empty(n, np.int64)
    found[group[first[order]]] = word[first[order]]  # the last written of a group stays
    return found
