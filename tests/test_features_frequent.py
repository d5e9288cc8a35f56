"""Arrays of frequent words joined with FTS5: the same features and scores as FTS5 alone."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.features import frequent, fts
from saesteer.features.frequent import largest
from saesteer.features.query import AllOf, AnyOf, Node, Phrase, Without
from saesteer.features.rank import FIELD_WEIGHTS
from saesteer.features.records import FIELDS, QUERY_FIELDS

WEIGHTS = ", ".join(str(FIELD_WEIGHTS[field]) for field in FIELDS)
# Stems differ from words, one word is no word to FTS5, one is never in a text.
WORDS = ["the", "boat", "boats", "waving", "waves", "naïve", "海", "x1", "of"]
ASKED = [*WORDS, "absent", "ba", "bo", "𞀀"]


@contextmanager
def built(texts: Sequence[Mapping[str, str]], share: float = 0.3) -> Iterator[sqlite3.Connection]:
    """Texts as an index; words in more than this share of them are frequent."""
    with pytest.MonkeyPatch.context() as patch, closing(sqlite3.connect(":memory:")) as connection:
        patch.setattr(frequent, "_LEAST", 0)
        patch.setattr(frequent, "_SHARE", share)
        fts.build(connection, enumerate(texts))
        yield connection


def plainly(connection: sqlite3.Connection, node: Node) -> dict[int, float]:
    """FTS5's own answer."""
    return dict(
        connection.execute(
            f"SELECT rowid, -bm25(texts, {WEIGHTS}) FROM texts WHERE texts MATCH ?",
            (fts.match(node, QUERY_FIELDS),),
        )
    )


def text(most: int) -> st.SearchStrategy[str]:
    words = st.lists(st.sampled_from(WORDS), max_size=most).map(" ".join)
    # Lengths of one, two and three bytes.
    return st.one_of(words, words, st.builds(lambda w, n: f"{w} " * n, words, st.integers(1, 3000)))


CORPORA = st.lists(
    st.fixed_dictionaries({}, optional={field: text(6) for field in FIELDS}),
    min_size=1, max_size=12,
)  # fmt: skip
LEAVES = st.builds(
    Phrase,
    st.lists(st.sampled_from(ASKED), min_size=1, max_size=2).map(tuple),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([None, None, None, None, *QUERY_FIELDS]),
)


def joined(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(parts, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(AllOf, several), st.builds(AnyOf, several), st.builds(Without, parts, several)
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=CORPORA, node=st.recursive(LEAVES, joined, max_leaves=6))
def test_any_expression_finds_what_fts5_finds(texts: list[dict[str, str]], node: Node) -> None:
    with built(texts) as connection:
        found = fts.Fts5(connection).scored(node, len(texts))
        assert sorted(i for i, _ in found) == sorted(plainly(connection, node))


# What FTS5 adds for a phrase of an AND within an OR that matched otherwise depends on how far it
# had read: scores are compared where it has no choice.
FLAT = st.lists(LEAVES, min_size=1, max_size=4).map(tuple)
PLAIN = st.one_of(
    st.builds(AnyOf, FLAT),
    st.builds(AllOf, st.lists(st.one_of(LEAVES, st.builds(AnyOf, FLAT)), min_size=1).map(tuple)),
    st.builds(Without, st.builds(AllOf, FLAT), FLAT),
    st.builds(Without, st.builds(AnyOf, FLAT), FLAT),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=CORPORA, node=PLAIN, share=st.sampled_from([0.0, 0.3, 0.6]))
def test_scores_are_those_of_bm25(texts: list[dict[str, str]], node: Node, share: float) -> None:
    with built(texts, share) as connection:
        found = fts.Fts5(connection).scored(node, len(texts))
        expected = plainly(connection, node)
        assert dict(found) == pytest.approx(expected, rel=1e-5)
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    texts=CORPORA, node=PLAIN, limit=st.integers(1, 4), data=st.data(),
)  # fmt: skip
def test_a_cut_keeps_the_best_and_what_was_asked_for_also(
    texts: list[dict[str, str]], node: Node, limit: int, data: st.DataObject
) -> None:
    numbers = st.integers(0, len(texts) - 1)
    also = data.draw(st.sets(numbers))
    mask = np.ones(len(texts), bool)
    mask[list(data.draw(st.sets(numbers)))] = False
    with built(texts) as connection:
        engine = fts.Fts5(connection)
        everything = engine.scored(node, len(texts))
        cut = engine.scored(node, limit, also=also)
        assert cut[:limit] == everything[:limit]
        assert sorted(cut[limit:]) == sorted(row for row in everything[limit:] if row[0] in also)
        masked = engine.scored(node, limit, allowed=mask)
        expected = [row for row in everything if mask[row[0]]][:limit]
        assert [i for i, _ in masked] == [i for i, _ in expected]
        assert [s for _, s in masked] == pytest.approx([s for _, s in expected], rel=1e-5)


def test_only_words_in_many_features_become_arrays() -> None:
    texts = [
        {"words": "common rare" if i == 0 else "common", "contexts": "often"} for i in range(9)
    ]
    with built(texts, 0.5) as connection:
        rows = connection.execute("SELECT term, df FROM frequent ORDER BY term").fetchall()
        assert rows == [("common", 9), ("often", 9)]
        terms = dict(connection.execute("SELECT * FROM terms"))
        assert terms == {"common": 9, "often": 9, "rare": 1}
    with closing(sqlite3.connect(":memory:")) as connection:
        fts.build(connection, enumerate(texts))
        assert connection.execute("SELECT count(*) FROM frequent").fetchone() == (0,)


def test_counts_above_a_byte_are_kept() -> None:
    texts = [{"label": "sea " * 40, "contexts": "a"}, {"contexts": "sea"}, {"words": "sea " * 5000}]
    with built(texts, 0.0) as connection:
        node = Phrase(("sea",))
        assert dict(fts.Fts5(connection).scored(node, 3)) == pytest.approx(
            plainly(connection, node)
        )


def test_unknown_lengths_are_said_and_fts5_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with built([{"words": "sea"}] * 5) as connection:
        for table in ("terms", "frequent", "lengths"):
            connection.execute(f"DROP TABLE {table}")
        # As if SQLite kept a number more than we know of.
        monkeypatch.setattr(frequent, "FIELDS", FIELDS[1:])
        with pytest.warns(UserWarning, match="not known"):
            fts.finish(connection)
        assert len(fts.Fts5(connection).scored(Phrase(("sea",)), 9)) == 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), max_size=12), k=st.integers(1, 12))
def test_the_largest_are_in_order_and_equal_ones_by_place(values: list[float], k: int) -> None:
    found = largest(np.array(values, np.float32), k)
    assert found.tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
