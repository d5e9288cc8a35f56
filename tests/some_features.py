"""Made-up features for tests of the index: by hand, and drawn by hypothesis."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from saesteer.features.records import (
    Entry,
    Example,
    Feature,
    Histogram,
    Neighbour,
    TokenStat,
    WordStat,
)


def an_entry(id: int, **words: float) -> Entry:
    """A feature that fires on some words (word = share of its activation)."""
    pieces = tuple(f" {word}" for word in words) or (" nothing",)
    example = Example(4.0, 3, 5, 7, 0, tuple(range(len(pieces))), pieces, (4.0,) * len(pieces))
    feature = Feature(
        id,
        ", ".join(words) or "(never fired)",
        0.5,
        0.02 if words else 0.0,
        2.0,
        4.0 + id if words else 0.0,
        100 if words else 0,
        float(len(words)),
        1.0,
        tokens=tuple(
            TokenStat(i, f" {w}", s, 10, 40, 0.01) for i, (w, s) in enumerate(words.items())
        ),
        words=tuple(WordStat(word, share, 40, 0.01) for word, share in words.items()),
        promotes=((" ocean", 1.5),),
        examples=(example,) if words else (),
    )
    texts = {"label": feature.label, "words": " ".join(words), "contexts": "".join(pieces)}
    return Entry(feature, texts)


SOME = [
    an_entry(0, sea=0.5, boat=0.25, wave=0.125),
    an_entry(1, boat=1.0),
    an_entry(2),
    an_entry(3, kitchen=0.5, bread=0.25),
]

# Six significant digits are what an index keeps.
FIGURES = st.builds(
    lambda n, e: float(f"{n}e{e}"), st.integers(-999_999, 999_999), st.integers(-9, 3)
)
_WORDS = st.text(max_size=8)
_COUNTS = st.integers(0, 2**40)
_TOKENS = st.integers(0, 2**20)


@st.composite
def _examples(draw: st.DrawFn) -> Example:
    # Activations as the pass gives them: 255 levels of the highest, in four digits, but for the one
    # that the example is about.
    n = draw(st.integers(1, 12))
    highest = float(f"{draw(st.integers(1, 9_999))}e{draw(st.integers(-6, 0))}")
    levels = draw(st.lists(st.integers(0, 255), min_size=n, max_size=n))
    levels[0] = 255
    activations = [float(f"{highest * level / 255:.4g}") for level in levels]
    firing = draw(st.integers(0, n - 1))
    if firing > 0:
        activations[firing] = float(f"{highest * draw(st.integers(1, 999)) / 1000:.4g}")
    return Example(
        activations[firing],
        draw(_COUNTS),
        draw(st.integers(0, 2**20)),
        draw(st.none() | _COUNTS),
        firing,
        tuple(draw(st.lists(_TOKENS, min_size=n, max_size=n))),
        tuple(draw(st.lists(_WORDS, min_size=n, max_size=n))),
        tuple(activations),
        draw(st.just("top") | st.integers(0, 9)),
    )


def _several(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(strategy, max_size=3).map(tuple)


def features() -> st.SearchStrategy[Feature]:
    """Any feature that an index can hold exactly; all are number 0."""
    tokens = st.builds(TokenStat, _TOKENS, _WORDS, FIGURES, _COUNTS, FIGURES, FIGURES)
    histogram = st.builds(
        Histogram, _several(st.floats(width=32, allow_nan=False)).filter(len), _several(_COUNTS)
    )
    others = st.builds(Neighbour, _TOKENS, FIGURES, st.none() | _COUNTS)
    logits = st.tuples(_WORDS, FIGURES)
    missing = st.none() | FIGURES
    return st.builds(
        Feature,
        st.just(0),
        _WORDS,
        *[FIGURES] * 4,
        _COUNTS,
        *[FIGURES] * 2,
        decoder_norm=missing,
        label_source=st.sampled_from(["evidence", "judge"]),
        label_score=missing,
        output_score=missing,
        own_effect=missing,
        token_set=st.none() | _WORDS,
        token_set_score=missing,
        tokens=_several(tokens),
        next_tokens=_several(tokens),
        words=_several(st.builds(WordStat, _WORDS, FIGURES, FIGURES, FIGURES)),
        promotes=_several(logits),
        suppresses=_several(logits),
        examples=_several(_examples()),
        activations=st.none() | histogram,
        logits=st.none() | histogram,
        positions=_several(FIGURES),
        neighbours=_several(others),
        coactive=_several(others),
    )


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in `folder` can be written; root, whom modes don't stop, is another meanwhile."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)
