"""The parts of features' records, made from arrays for many features at a time."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from saesteer.features.examples import Examples
from saesteer.features.firing_words import Words
from saesteer.features.histogram import Histograms
from saesteer.features.records import Example, Histogram, Neighbour, TokenStat, WordStat
from saesteer.features.tally import TokenTally, rank_in_group
from saesteer.features.weights import WeightChunk
from saesteer.features.words_in import NONE, Lexicon

_T = TypeVar("_T")

# A chunk of weights, and where in it the features begin that are meant.
Part = tuple[WeightChunk, int]


class Shown(NamedTuple):
    """Examples of some features, those of a feature next to each other, strongest first.

    rows [n]: the row of the feature of each; groups [n]: "top" or its tenth; the others as of
    `examples.Rows`, [n] and [n, window].
    """

    rows: NDArray[np.int64]
    groups: list[Any]
    values: NDArray[np.float32]
    documents: NDArray[np.int64]
    contexts: NDArray[np.int64]
    positions: NDArray[np.int32]
    tokens: NDArray[np.int32]
    activations: NDArray[np.float32]

    @classmethod
    def of(
        cls, examples: Examples, index: NDArray[np.int64], every: Histograms | None = None
    ) -> "Shown":
        """every: of all activations, for examples that are a sample of them; None: the top."""
        found = examples.rows(index)
        there = found.values > 0
        row = np.nonzero(there)[0]
        groups: list[Any] = ["top"] * len(row)
        if every is not None:
            groups = every.tenths(index[row], found.values[there]).tolist()
        return cls(
            row,
            groups,
            found.values[there],
            found.documents[there],
            found.contexts[there],
            found.positions[there],
            found.tokens[there],
            found.activations[there],
        )


class Tokens(NamedTuple):
    """Tokens on which features fire, [k] each, each row's heaviest first: the feature's row, and
    what `TokenStat` has."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    share: NDArray[np.float64]
    counts: NDArray[np.int64]
    lift: NDArray[np.float64]
    base: NDArray[np.float64]


def heaviest(
    tally: TokenTally,
    index: NDArray[np.int64],
    every: NDArray[np.int64],
    fired: NDArray[np.int64],
    mass: NDArray[np.int64],
    most: int,
) -> Tokens:
    """The heaviest tokens of consecutive features, as `TokenStat` has them.

    every [vocab]: how often each token occurred; fired, mass [d_sae]: the sums that shares are of.
    """
    vocab_size = tally.vocab_size
    ends = np.searchsorted(tally.keys, [index[0] * vocab_size, (index[-1] + 1) * vocab_size])
    mine = slice(*ends.tolist())
    keys, weights = tally.keys[mine], tally.mass[mine]
    order = np.lexsort((keys, -weights, keys // vocab_size))
    order = order[rank_in_group(keys[order] // vocab_size) < most]
    feature, token = np.divmod(keys[order], vocab_size)
    counts = tally.counts[mine][order]
    base = every[token] / every.sum()
    share = weights[order] / np.maximum(1, mass[feature])
    lift = counts / fired[feature] / base
    return Tokens(feature - index[0], token, share, counts, lift, base)


def token_stats(found: Tokens, lexicon: Lexicon, m: int) -> list[tuple[TokenStat, ...]]:
    columns = (
        found.ids, lexicon.texts(found.ids), found.share, found.counts, found.lift, found.base
    )  # fmt: skip
    return by_row(found.rows, list(map(TokenStat, *(x.tolist() for x in columns))), m)


def word_stats(words: Words, spelled: Sequence[str], m: int) -> list[tuple[WordStat, ...]]:
    names = [spelled[i] for i in words.numbers.tolist()]
    columns = (x.tolist() for x in (words.share, words.lift, words.base))
    return by_row(words.rows, list(map(WordStat, names, *columns)), m)


def shown_examples(
    shown: Shown, pieces: NDArray[np.object_], before: int, m: int
) -> list[tuple[Example, ...]]:
    inside = shown.tokens != NONE
    first = inside.argmax(axis=1)
    columns = (
        shown.values, shown.contexts, shown.positions, shown.documents, first,
        first + inside.sum(axis=1), shown.tokens, pieces, shown.activations,
    )  # fmt: skip
    found = [
        Example(
            value,
            context,
            position,
            document if document >= 0 else None,
            before - start,
            tuple(tokens[start:stop]),
            tuple(texts[start:stop]),
            tuple(acts[start:stop]),
            group,
        )
        for value, context, position, document, start, stop, tokens, texts, acts, group in zip(
            *(x.tolist() for x in columns), shown.groups, strict=True
        )
    ]
    return by_row(shown.rows, found, m)


def written(part: Part | None, lexicon: Lexicon, m: int) -> list[dict[str, Any]]:
    """Of each of m features, what its weights say: fields of `Feature`."""
    if part is None:
        return [{} for _ in range(m)]
    chunk, start = part
    mine = slice(start, start + m)
    near = neighbours(chunk.neighbours[mine], chunk.cosines[mine])
    found: list[dict[str, Any]] = [
        {"decoder_norm": rounded(norm), "neighbours": like}
        for norm, like in zip(chunk.norms[mine].tolist(), near, strict=True)
    ]
    if chunk.logits is None:
        return found
    logits = chunk.logits
    edges = np.linspace(logits.low[mine], logits.high[mine], logits.histogram.shape[1] + 1, axis=1)
    columns = (
        _logits(lexicon, logits.lens.promoted[mine], logits.lens.promoted_logits[mine]),
        _logits(lexicon, logits.lens.suppressed[mine], logits.lens.suppressed_logits[mine]),
        histograms(edges, logits.histogram[mine]),
        logits.token_sets[mine],
        logits.token_set_scores[mine].tolist(),
    )
    for fields, promotes, suppresses, histogram, name, score in zip(found, *columns, strict=True):
        fields |= {"promotes": promotes, "suppresses": suppresses, "logits": histogram}
        if name is not None:
            fields |= {"token_set": name, "token_set_score": rounded(score)}
    return found


def _logits(
    lexicon: Lexicon, ids: NDArray[np.int64], values: NDArray[np.float32]
) -> list[tuple[tuple[str, float], ...]]:
    rows = zip(lexicon.texts(ids).tolist(), values.tolist(), strict=True)
    return [tuple(zip(texts, row, strict=True)) for texts, row in rows]


def histograms(edges: NDArray[np.floating], counts: NDArray[np.integer]) -> list[Histogram]:
    rows = zip(edges.tolist(), counts.tolist(), strict=True)
    return [Histogram(tuple(edge), tuple(count)) for edge, count in rows]


def neighbours(
    features: NDArray[np.integer],
    values: NDArray[np.floating],
    n: NDArray[np.integer] | None = None,
) -> list[tuple[Neighbour, ...]]:
    """Of each row the features that aren't −1; n: on how many tokens both fire."""
    counts = np.full(features.shape, None) if n is None else n
    rows = zip(features.tolist(), values.tolist(), counts.tolist(), strict=True)
    return [
        tuple(Neighbour(f, v, c) for f, v, c in zip(*row, strict=True) if f >= 0) for row in rows
    ]


def by_row(rows: NDArray[np.int64], items: list[_T], m: int) -> list[tuple[_T, ...]]:
    """`items` [n], whose row numbers ascend, as one tuple a row."""
    ends = np.searchsorted(rows, np.arange(m + 1)).tolist()
    return [tuple(items[a:b]) for a, b in itertools.pairwise(ends)]


def rounded(value: float) -> float:
    """Four significant digits: what is shown never needs more."""
    return float(f"{value:.4g}")
