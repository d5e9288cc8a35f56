"""The whole words that features fire on, as counted over all the text: many features at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.features.statistics import Statistics
from saesteer.features.tally import rank_in_group
from saesteer.features.words_in import WORDS, Lexicon, Windows

# Words that belong to a feature: it fires on them this many times more often than on a token.
OWN_LIFT = 2.0


@dataclass(frozen=True)
class WordTable:
    """The words of a text.

    keys [n], sorted: their hashes; texts [n]: as written; groups [n]: which are one word but for
    case; counts [groups]: occurrences.
    """

    keys: NDArray[np.int64]
    texts: list[str]
    groups: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, statistics: Statistics) -> "WordTable":
        tally = statistics.word_counts
        texts = [statistics.spellings[key] for key in tally.keys.tolist()]
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(text.casefold(), len(numbers)) for text in texts]
        found = np.array(groups, np.int64)
        counts = np.bincount(found, tally.mass, minlength=len(numbers)).astype(np.int64)
        return cls(tally.keys, texts, found, counts)


@dataclass(frozen=True)
class Words:
    """Whole words on which features fire, [k] each: the feature's row, the number of the word as
    mostly spelled and of its key (casefolded), share, lift and base rate as of `WordStat`."""

    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    keys: NDArray[np.int64]
    share: NDArray[np.float64]
    lift: NDArray[np.float64]
    base: NDArray[np.float64]


def firing_words(
    statistics: Statistics,
    table: WordTable,
    index: NDArray[np.int64],
    lexicon: Lexicon,
    *,
    most: int,
) -> Words:
    """The whole words each of some consecutive features fires on, heaviest first, case merged.

    Args:
        statistics: settled.
        index: the features; row i is index[i].
        most: words kept a feature.
    """
    tally = statistics.words
    ends = np.searchsorted(tally.keys, [index[0] * WORDS, (index[-1] + 1) * WORDS])
    mine = slice(*ends.tolist())
    feature, word = np.divmod(tally.keys[mine], WORDS)
    at = np.searchsorted(table.keys, word)
    # Words so rare that they were forgotten stand nowhere.
    known = np.append(table.keys, -1)[at] == word
    feature, at = feature[known], at[known]
    mass, counts = tally.mass[mine][known], tally.counts[mine][known]
    row, group = feature - index[0], table.groups[at]
    first, pair = _first_seen(row, group)
    total, fired = _sums(pair, mass, len(first)), _sums(pair, counts, len(first))
    spelled = _heaviest(pair, at, mass, len(first))
    order = np.lexsort((group[first], -total, row[first]))
    order = order[rank_in_group(row[first[order]]) < most]
    chosen = first[order]
    numbers = np.array([lexicon.number(table.texts[i]) for i in spelled[order].tolist()], np.int64)
    occurred = table.counts[group[chosen]]
    return Words(
        row[chosen],
        numbers,
        lexicon.keys(numbers),
        total[order] / statistics.mass[feature[chosen]],
        np.minimum(1.0, fired[order] / occurred) / statistics.density[feature[chosen]],
        occurred / max(1, table.counts.sum()),
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


def _sums(group: NDArray[np.intp], weight: NDArray[np.integer], n: int) -> NDArray[np.float64]:
    """The sum of the weights of each of n groups."""
    return np.bincount(group, weight, minlength=n).astype(np.float64)


def _heaviest(
    group: NDArray[np.intp], word: NDArray[np.intp], weight: NDArray[np.integer], n: int
) -> NDArray[np.int64]:
    """Of each of n groups, the word of the largest summed weight; the first seen of equals."""
    first, pair = _first_seen(group, word)
    sums = _sums(pair, weight, len(first))
    order = np.lexsort((-first, sums, group[first]))
    found = np.empty(n, np.int64)
    found[group[first[order]]] = word[first[order]]  # the last written of a group stays
    return found
