"""From statistics and weights to the record and the searchable text of every feature."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from saesteer.core.progress import progress
from saesteer.errors import IndexingError
from saesteer.features import labels
from saesteer.features.coactive import partners
from saesteer.features.entry_parts import (
    Part,
    Shown,
    by_row,
    heaviest,
    histograms,
    neighbours,
    rounded,
    shown_examples,
    token_stats,
    word_stats,
    written,
)
from saesteer.features.firing_words import WordTable, company, firing_words
from saesteer.features.records import Entry, Feature
from saesteer.features.statistics import Statistics
from saesteer.features.weights import WeightChunk
from saesteer.features.words import Pieces
from saesteer.features.words_in import Lexicon, beside

# Tokens, following tokens and words kept a feature.
_TOKENS, _FOLLOWING, _WORDS = 40, 10, 40
# Features described at a time. With more, the garbage collector takes as long as the work.
_FEATURES = 32
# How often the field of words repeats a word: its share of the activation, in this many parts.
_REPEATS = 10
# A word that nobody looks for, between what doesn't stand side by side: no phrase runs across it.
BREAK = " ꙮ "
# A feature fires "at the start" when this share of its firings is in the first 4 places, and that
# is this many times what all tokens have there.
_EARLY_BINS, _EARLY, _EARLY_LIFT = 3, 0.8, 5.0


def entries(
    statistics: Statistics,
    weights: Iterable[WeightChunk] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Entry]:
    """The record and the searchable text of every feature, in order, in bounded memory.

    Args:
        weights: `weights.describe` of the same SAE; None: nothing is said of what they promote.

    Raises:
        IndexingError: weights of another number of features.
    """
    maker = _Maker(statistics, tokenizer)
    described = 0
    with progress("label", statistics.d_sae, unit="feature") as bar:
        for rows, part in _stretches(statistics.d_sae, weights):
            described = rows.stop
            if described > statistics.d_sae:
                break
            for entry in maker.described(rows, part):
                yield entry
                bar.update()
    if described != statistics.d_sae:
        raise IndexingError(
            f"weights of {described} features and statistics of {statistics.d_sae} don't belong "
            "together; make both from one SAE"
        )


def texts(feature: Feature, around: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """What a feature can be found by, by field of `records.FIELDS`.

    `words` repeats a word by its share of the activation, so that BM25 counts it by that.

    Args:
        around: of each of its strongest examples the word before, its own, and the word after.
    """
    return {
        "label": feature.label if feature.n_fired else "",
        "words": " ".join(
            word.text for word in feature.words for _ in range(1 + int(_REPEATS * word.share))
        ),
        "near": BREAK.join(" ".join(three) for three in around),
        "promotes": BREAK.join(text for text, _ in feature.promotes),
        "contexts": BREAK.join("".join(x.pieces) for x in feature.examples if x.group == "top"),
    }


def _stretches(
    d_sae: int, weights: Iterable[WeightChunk] | None
) -> Iterator[tuple[range, Part | None]]:
    """Consecutive features, with the chunk that describes their weights and where in it."""
    if weights is None:
        for start in range(0, d_sae, _FEATURES):
            yield range(start, min(start + _FEATURES, d_sae)), None
        return
    begin = 0
    for chunk in weights:
        for start in range(0, len(chunk), _FEATURES):
            stop = min(start + _FEATURES, len(chunk))
            yield range(begin + start, begin + stop), (chunk, start)
        begin += len(chunk)


class _Maker:
    """Makes entries: what is the same for all features."""

    def __init__(self, statistics: Statistics, tokenizer: PreTrainedTokenizerBase):
        self.statistics = statistics
        self.lexicon = Lexicon(Pieces(tokenizer), len(statistics.token_counts))
        self.empty = self.lexicon.number("")
        self.table = WordTable.of(statistics)
        self.partners = partners(statistics.token_sample, statistics.d_sae)
        s = statistics
        self.figures = s.density, s.mean_act, s.max_act, s.fired
        every = statistics.position_counts / max(1, statistics.position_counts.sum())
        self.early = every[:_EARLY_BINS].sum()
        self.places = np.where(every > 0, every, np.inf)

    def described(self, rows: range, part: Part | None) -> Iterator[Entry]:
        """The entries of some consecutive features."""
        s, lexicon, m = self.statistics, self.lexicon, len(rows)
        index = np.arange(rows.start, rows.stop)
        lexicon.forget(1)
        top, sample = Shown.of(s.examples, index), Shown.of(s.sample, index, s.histograms)
        windows = lexicon.read(top.tokens)
        tokens = heaviest(s.tally, index, s.token_counts, s.fired, s.mass, _TOKENS)
        following = heaviest(
            s.next_tally, index, s.next_counts, s.next_fired, s.next_mass, _FOLLOWING
        )
        words = firing_words(s, self.table, index, lexicon, most=_WORDS)
        before, after = beside(windows, s.before, self.empty)
        own = windows.words[:, s.before]
        spelled = lexicon.words
        three = zip(before.tolist(), own.tolist(), after.tolist(), strict=True)
        around = by_row(top.rows, [(spelled[a], spelled[b], spelled[c]) for a, b, c in three], m)
        strongest = shown_examples(top, windows.pieces, s.before, m)
        drawn = shown_examples(sample, lexicon.spelled(sample.tokens), s.before, m)
        about_words, about_tokens = word_stats(words, spelled, m), token_stats(tokens, lexicon, m)
        next_stats = token_stats(following, lexicon, m)
        places = s.positions[index] / np.maximum(1, s.fired[index, None])
        positions = places / self.places
        early = places[:, :_EARLY_BINS].sum(axis=1)
        early = (early >= _EARLY) & (early >= _EARLY_LIFT * self.early)
        activations = histograms(s.histograms.edges(index), s.histograms.counts[index])
        kept = company(words, windows, top.rows, top.activations, lexicon, m)
        coactive = neighbours(
            self.partners.features[index], self.partners.lift[index], self.partners.n[index]
        )
        of_weights = written(part, lexicon, m)
        figures = zip(*(x[index].tolist() for x in self.figures), strict=True)
        for i, (density, mean_act, max_act, fired) in enumerate(figures):
            about = about_words[i]
            label, confidence = labels.label(
                about, around[i], promotes=of_weights[i].get("token_set"), early=bool(early[i])
            )
            feature = Feature(
                rows[i],
                label,
                rounded(confidence),
                rounded(density),
                rounded(mean_act),
                max_act,
                fired,
                rounded(labels.breadth(about)),
                rounded(float(kept[i])),
                tokens=about_tokens[i],
                next_tokens=next_stats[i],
                words=about,
                examples=strongest[i] + drawn[i],
                activations=activations[i] if fired else None,
                positions=tuple(positions[i].tolist()) if fired else (),
                coactive=coactive[i],
                **of_weights[i],
            )
            yield Entry(feature, texts(feature, around[i]))
