"""The other text engine finds what FTS5 finds."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saesteer.errors import IndexingError
from saesteer.features import store, tantivy_engine
from saesteer.features.query import AllOf, AnyOf, Node, Phrase, Without
from saesteer.features.records import FIELDS, QUERY_FIELDS, Entry, Feature
from saesteer.features.search import Index

WORDS = ["boat", "boats", "waves", "sea", "naïve", "海"]


def test_without_it_an_index_is_searched_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tantivy", None)
    path = tmp_path / "i.sqlite"
    write(path, [{"words": "sea"}])
    with Index.open(path) as index:
        with pytest.raises(IndexingError, match=r"saesteer\[search\]"):
            tantivy_engine.build(path, [(0, {"words": "sea"})], index.meta)
        assert [hit.id for hit in index.search("sea")] == [0]


def write(path: Path, texts: list[Mapping[str, str]]) -> None:
    features = (Feature(i, "", 0, 0, 0, 0, 0, 0, 0) for i in range(len(texts)))
    entries = (Entry(f, text) for f, text in zip(features, texts, strict=True))
    store.write(path, entries, {"made": "now"})


def build(path: Path, texts: list[Mapping[str, str]]) -> None:
    pytest.importorskip("tantivy", reason="the extra `search` is not installed")
    write(path, texts)
    with Index.open(path) as index:
        tantivy_engine.build(path, enumerate(texts), index.meta)


def engine(path: Path) -> tantivy_engine.Tantivy:
    with Index.open(path) as index:
        found = tantivy_engine.beside(path, index.meta)
    assert found is not None
    return found


LEAVES = st.builds(
    Phrase,
    st.lists(st.sampled_from([*WORDS, "absent"]), min_size=1, max_size=2).map(tuple),
    st.just(False),
    st.sampled_from([None, None, *QUERY_FIELDS]),
)


def joined(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(parts, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(AllOf, several), st.builds(AnyOf, several), st.builds(Without, parts, several)
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("tantivy") / "i.sqlite"
    rng = np.random.default_rng(3)
    texts = [
        {field: " ".join(rng.choice(WORDS, rng.integers(0, 3))) for field in FIELDS}
        for _ in range(40)
    ]
    build(path, texts)
    return path, len(texts)


@settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(node=st.recursive(LEAVES, joined, max_leaves=5))
def test_both_engines_find_the_same_features(both: tuple[Path, int], node: Node) -> None:
    from saesteer.features.fts import Fts5
    from saesteer.features.migrate import connect

    path, n = both
    connection = connect(path)
    theirs = Fts5(connection).scored(node, n)
    connection.close()
    mine = engine(path).scored(node, n)
    assert sorted(i for i, _ in mine) == sorted(i for i, _ in theirs)
    assert [score for _, score in mine] == sorted((s for _, s in mine), reverse=True)


def test_limit_mask_and_also(both: tuple[Path, int]) -> None:
    path, n = both
    text, node = engine(path), AnyOf((Phrase(("boat",)), Phrase(("sea",))))
    everything = text.scored(node, n)
    assert len(everything) > 8
    assert text.scored(node, 3) == everything[:3]
    also = {everything[2][0], everything[-1][0], 10_000}
    chosen = text.scored(node, 3, also=also)
    assert [i for i, _ in chosen] == [*(i for i, _ in everything[:3]), everything[-1][0]]
    assert chosen[3][1] == pytest.approx(everything[-1][1])
    mask = np.ones(n, bool)
    mask[everything[0][0]] = False
    assert text.scored(node, 3, allowed=mask) == everything[1:4]


def test_labels_weigh_more_than_contexts_and_beginnings_are_found(tmp_path: Path) -> None:
    build(tmp_path / "i.sqlite", [{"contexts": "sailing boat"}, {"label": "sailing boat"}])
    text = engine(tmp_path / "i.sqlite")
    assert [i for i, _ in text.scored(Phrase(("boat",)), 2)] == [1, 0]
    assert {i for i, _ in text.scored(Phrase(("sai",), prefix=True), 2)} == {0, 1}
    assert {i for i, _ in text.scored(Phrase(("sailing", "bo"), prefix=True), 2)} == {0, 1}
    assert text.scored(Phrase(("bo.t",), prefix=True), 2) == []


def test_it_is_used_only_for_the_index_it_was_made_of(tmp_path: Path) -> None:
    path = tmp_path / "i.sqlite"
    build(path, [{"words": "sea"}])
    with Index.open(path) as index:
        assert [hit.id for hit in index.search("sea")] == [0]
        assert tantivy_engine.beside(path, {**index.meta, "made": "later"}) is None
        (tantivy_engine.folder_of(path) / "meta.json").write_text("{")
        assert tantivy_engine.beside(path, index.meta) is None
