"""The index file: what goes in comes out, whole or not at all."""

import sqlite3
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.errors import IndexingError
from saesteer.features import store
from saesteer.features.evidence import Vocab, pack, unpack
from saesteer.features.migrate import connect, reading, writing
from saesteer.features.records import FIELDS, Entry, Feature, WordStat
from tests.some_features import SOME, an_entry, features

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a run's folder" / "features.sqlite"
    store.write(path, SOME, {"sae_hash": "abc", "n_tokens": 5000})
    return path


def loaded(path: Path, ids: list[int] | range, *, brief: bool = False) -> list[Feature]:
    with reading(path) as connection:
        return store.load(connection, ids, brief=brief)


def rows(path: Path, sql: str) -> list[tuple]:
    with reading(path) as connection:
        return connection.execute(sql).fetchall()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=st.lists(features(), min_size=1, max_size=4))
def test_any_feature_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Feature]
) -> None:
    path = tmp_path_factory.mktemp("index") / "features.sqlite"
    written = [replace(feature, id=i) for i, feature in enumerate(drawn)]
    store.write(path, [Entry(feature, {}) for feature in written], {})
    assert loaded(path, range(len(written))) == written
    for feature, brief in zip(written, loaded(path, range(len(written)), brief=True), strict=True):
        words, examples = feature.words[:8], feature.examples[:1]
        assert (brief.words, brief.examples) == (words, examples)
        assert brief.label == feature.label and not brief.tokens


@settings(derandomize=True)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=8))
def test_figures_keep_six_digits(figures: list[float]) -> None:
    words = tuple(WordStat("w", x, x, x) for x in figures)
    feature, vocab = Feature(0, "", *[0.0] * 4, 0, 0.0, 0.0, words=words), Vocab()
    back = unpack(replace(feature, words=()), pack(feature, vocab), vocab.texts)
    for word, x in zip(back.words, figures, strict=True):
        assert word.share == pytest.approx(x, rel=5.1e-6, abs=0)


def test_records_come_in_the_order_asked_for(path: Path) -> None:
    assert [feature.id for feature in loaded(path, [3, 99, 0, 2, -1])] == [3, 0, 2]
    many = list(range(4)) * 300  # more than SQLite takes at once
    assert [feature.id for feature in loaded(path, many)] == many


def test_meta_and_columns(path: Path) -> None:
    with reading(path) as connection:
        meta = {"sae_hash": "abc", "n_tokens": 5000, "n_features": 4, "n_alive": 3}
        assert store.read_meta(connection) == meta
        for name in ("density", "max_act", "output_score"):
            values = [getattr(entry.feature, name) for entry in SOME]
            expected = np.array([np.nan if v is None else v for v in values], "<f4")
            found = np.frombuffer(store.column(connection, name), "<f4")
            np.testing.assert_array_equal(found, expected)
        with pytest.raises(IndexingError, match="density, max_act"):
            store.column(connection, "breadth")


def test_of_each_word_the_best_thousand_features_are_kept_best_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shares = rng.integers(1, 400, size=1_030) / 400  # with ties
    entries = [an_entry(i, boat=float(share)) for i, share in enumerate(shares)]
    entries[5] = an_entry(5, boat=0.25, sea=0.5)
    shares[5] = 0.25
    path = tmp_path / "features.sqlite"
    store.write(path, entries, {})
    fires = "SELECT feature, place, share FROM fires JOIN words ON words.rowid = word "
    found = rows(path, f"{fires} WHERE words.text = 'boat' ORDER BY place")
    best = sorted(range(1_030), key=lambda i: (-shares[i], i))[:1_000]
    assert found == [(i, place, shares[i]) for place, i in enumerate(best)]
    assert rows(path, f"{fires} WHERE words.text = 'sea'") == [(5, 0, 0.5)]


def test_all_fields_are_searchable(tmp_path: Path) -> None:
    texts = {field: f"word{field}" for field in FIELDS}
    path = tmp_path / "features.sqlite"
    store.write(path, [SOME[0], Entry(replace(SOME[2].feature, id=1), texts)], {})
    for field in FIELDS:
        query = f"SELECT rowid FROM texts WHERE texts MATCH '{field} : word{field}'"
        assert rows(path, query) == [(1,)]


def test_entries_are_not_kept(tmp_path: Path) -> None:
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def stream() -> Iterator[Entry]:
        nonlocal alive, most
        for i in range(300):
            entry = an_entry(i, boat=0.5)
            weakref.finalize(entry, gone)
            alive += 1
            most = max(most, alive)
            yield entry

    store.write(tmp_path / "features.sqlite", stream(), {})
    assert most <= 3


@pytest.mark.parametrize("numbers", [[1], [0, 2], [0, 0], [1, 0]])
def test_features_must_be_numbered_in_order(tmp_path: Path, numbers: list[int]) -> None:
    with pytest.raises(IndexingError, match=r"0, 1, 2, …"):
        store.write(tmp_path / "i.sqlite", [an_entry(i) for i in numbers], {})
    assert not (tmp_path / "i.sqlite").exists()


def test_a_failed_write_leaves_the_old_index(path: Path) -> None:
    before = path.read_bytes(), sorted(path.parent.iterdir())

    def broken() -> Iterator[Entry]:
        yield SOME[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(path, broken(), {})
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == before


def test_lone_surrogates_and_nul_in_text_are_stored(tmp_path: Path) -> None:
    odd = an_entry(0, **{"bo\0at": 0.5, "\ud800x": 0.25})
    path = tmp_path / "features.sqlite"
    store.write(path, [odd], {})
    assert [word.text for word in loaded(path, [0])[0].words] == ["bo\0at", "?x"]


def test_effects_are_kept_together_or_not_at_all(path: Path) -> None:
    def kept() -> tuple:
        features = [(f.output_score, f.own_effect) for f in loaded(path, range(4))]
        with reading(path) as connection:
            column = np.frombuffer(store.column(connection, "own_effect"), "<f4").tolist()
        return features, column, rows(path, "SELECT * FROM outputs")

    store.keep_outputs(path, [(0, 0.5, 0.25), (3, None, None)], {"amplification": 8})
    store.keep_outputs(path, [(0, 0.75, -0.5), (1, 1.0, 0.0)], {"amplification": 4})
    features, column, outputs = kept()
    assert features == [(0.75, -0.5), (1.0, 0.0), (None, None), (None, None)]
    assert column[:2] == [-0.5, 0.0] and np.isnan(column[2:]).all()
    assert [row[:3] for row in outputs] == [(0, 0.75, -0.5), (1, 1.0, 0.0), (3, None, None)]
    with pytest.raises(IndexingError, match="cannot write"):
        store.keep_outputs(path, [(1, 0.0, 0.0), (2, "text", object())], {})  # type: ignore[list-item]
    assert kept()[0] == features and kept()[2] == outputs


def test_damaged_files_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()

    def of_version(version: int) -> bytes:
        file = tmp_path / "of_version.sqlite"
        file.write_bytes(whole)
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        return file.read_bytes()

    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (a)")
    cases = {
        "there is no feature index": None,
        "is no feature index;": b"not a database at all" * 100,
        "is cut off": whole[: len(whole) // 2],
        "no feature index but another SQLite file": other.read_bytes(),
        "version 99, expected 3; .* newer saesteer": of_version(99),
        "version 0, expected 3; .* not whole": of_version(0),
        "is no feature index": b"",
    }
    for message, data in cases.items():
        file = tmp_path / "features.sqlite"
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(IndexingError, match=message) as raised:
            connect(file)
        assert "saesteer index" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_cut_off_anywhere_it_is_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    file = tmp_path / "features.sqlite"
    for size in (0, 15, 16, 99, 100, 1_000, 4_095, *range(4_096, len(whole), 4_096 * 3 + 17)):
        file.write_bytes(whole[:size])
        with pytest.raises(IndexingError):
            connect(file)
    file.write_bytes(whole)
    assert loaded(file, range(4)) == [entry.feature for entry in SOME]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_record_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("index") / "features.sqlite"
    store.write(path, SOME, {})
    with writing(path) as connection:
        blob = connection.execute("SELECT data FROM evidence WHERE id = 0").fetchone()[0]
        cut = data.draw(st.integers(0, len(blob) - 1))
        damaged = data.draw(st.sampled_from([blob[:cut], blob[:cut] + b"\xff\xff" + blob[cut:]]))
        connection.execute("UPDATE evidence SET data = ? WHERE id = 0", (damaged,))
    with pytest.raises(IndexingError, match="feature 0 is damaged"):
        loaded(path, [0])


def test_the_search_side_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom saesteer.features import records, store, evidence, migrate, notes\n"
        "heavy = {'torch', 'numpy', 'transformers', 'sae_lens'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
