"""A feature index of made-up features, as large as one likes: what `search.py` searches.

Every feature has 20 contexts of 32 words, drawn from 50,000 by Zipf's law (exponent 1), and fires
on the 13th word of each. Label, words and neighbours of the firing word are made of these as
`saesteer index` makes them; it promotes 10 words. The index is written by `saesteer.features.store`
and searched like any other.
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from saesteer.features import store
from saesteer.features.records import Entry, Example, Feature, TokenStat, WordStat

VOCABULARY, CONTEXTS, WORDS = 50_000, 20, 32
_FIRING, _PROMOTED, _BLOCK = 12, 10, 1_024
_SHARE = np.cumsum(1 / np.arange(1, VOCABULARY + 1))


@cache
def vocabulary() -> list[str]:
    """Made-up words of three to nine letters, commonest first."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        words["".join(rng.choice(letters, rng.integers(3, 10)))] = None
    # Which were drawn first says nothing of their letters.
    return list(words)


def drawn(rng: np.random.Generator, *shape: int) -> Any:
    """Numbers of words, by frequency: P(word of rank r) ~ 1 / r."""
    return np.searchsorted(_SHARE, rng.random(shape) * _SHARE[-1])


def block(number: int) -> Any:
    """The words of 1,024 features: [1024, 20, 32]."""
    return drawn(np.random.default_rng([1, number]), _BLOCK, CONTEXTS, WORDS)


def write(path: Path, n_features: int) -> float:
    """Write the index, and say how many seconds that took beyond making the features up."""
    entries = _Entries(n_features)
    begin = time.perf_counter()
    store.write(path, entries, {"sae_hash": "synthetic", "n_tokens": 10**9})
    return time.perf_counter() - begin - entries.seconds


class _Entries:
    """Entries of all features; `seconds` spent on making them up."""

    def __init__(self, n_features: int):
        self.n_features = n_features
        self.seconds = 0.0
        self._words = vocabulary()

    def __iter__(self) -> Iterator[Entry]:
        begin = time.perf_counter()
        rng = np.random.default_rng(2)
        for feature in range(self.n_features):
            if feature % _BLOCK == 0:
                ids = block(feature // _BLOCK)
            entry = self._entry(feature, ids[feature % _BLOCK], rng)
            self.seconds += time.perf_counter() - begin
            yield entry
            begin = time.perf_counter()

    def _entry(self, feature: int, ids: Any, rng: np.random.Generator) -> Entry:
        texts = [[self._words[i] for i in row] for row in ids.tolist()]
        rows = list(zip(texts, ids.tolist(), strict=True))
        own = Counter((text[_FIRING], numbers[_FIRING]) for text, numbers in rows)
        share = {word: n / CONTEXTS for (word, _), n in own.most_common()}
        tokens = tuple(
            TokenStat(number, f" {word}", n / CONTEXTS, 50, 20.0, 0.001)
            for (word, number), n in own.most_common()
        )
        density = float(10 ** rng.uniform(-4, -1))
        activations = tuple(np.exp(-np.abs(np.arange(WORDS) - _FIRING) / 2).tolist())
        promotes = [self._words[i] for i in drawn(rng, _PROMOTED).tolist()]
        record = Feature(
            feature,
            ", ".join(list(share)[:3]),
            0.5,
            density,
            1.0,
            4.0,
            1_000,
            float(len(share)),
            1.0,
            tokens=tokens,
            words=tuple(WordStat(w, s, 20.0, 0.001) for w, s in share.items()),
            promotes=tuple((f" {word}", 1.0) for word in promotes),
            examples=tuple(
                Example(4.0 - i / CONTEXTS, i, _FIRING, i, _FIRING, tuple(numbers),
                        tuple(f" {word}" for word in text), activations)
                for i, (text, numbers) in enumerate(rows)
            ),
        )  # fmt: skip
        fields = {
            "label": record.label,
            "words": " ".join(w for w, s in share.items() for _ in range(1 + int(10 * s))),
            "near": " ".join(word for row in texts for word in row[_FIRING - 1 : _FIRING + 2]),
            "promotes": " ".join(promotes),
            "contexts": " ".join(word for row in texts for word in row),
        }
        return Entry(record, fields)
