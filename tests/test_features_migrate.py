"""An index that an older saesteer made: brought up to date once, losing nothing."""

import gzip
import json
import sqlite3
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from saesteer.errors import IndexingError
from saesteer.features import notes, store
from saesteer.features.migrate import connect, migrate, reading, writing
from saesteer.features.search import Index
from tests.some_features import read_only

# 11 features; made by the code of the first version, from the entries of test_features_search.py.
OLD = gzip.decompress((Path(__file__).parent / "features_v1.sqlite.gz").read_bytes())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "features.sqlite"
    path.write_bytes(OLD)
    return path


def as_it_was(path: Path, sql: str) -> list[tuple]:
    """Rows of the file as it lies there, not brought up to date."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def test_records_are_those_of_the_old_index(old: Path) -> None:
    rows = as_it_was(old, "SELECT * FROM features ORDER BY id")
    evidence = dict(as_it_was(old, "SELECT * FROM evidence"))
    meta = dict(as_it_was(old, "SELECT * FROM meta"))
    with reading(old) as connection:
        features = store.load(connection, range(len(rows)))
        found = store.read_meta(connection)
    assert len(features) == len(rows) == 11
    for feature, row in zip(features, rows, strict=True):
        assert tuple(vars(feature).values())[:9] == row
        before = json.loads(zlib.decompress(evidence[feature.id]))
        assert [list(vars(token).values()) for token in feature.tokens] == before["tokens"]
        assert [list(vars(word).values()) for word in feature.words] == before["words"]
        assert [list(pair) for pair in feature.promotes] == before["promotes"]
        assert [list(pair) for pair in feature.suppresses] == before["suppresses"]
        examples = [json.loads(json.dumps(list(vars(x).values()))) for x in feature.examples]
        assert examples == [[*example, "top"] for example in before["examples"]]
        # What the old version hadn't measured is unknown, not 0.
        assert feature.label_source == "evidence"
        assert (feature.decoder_norm, feature.output_score, feature.token_set) == (None,) * 3
        assert (feature.activations, feature.neighbours, feature.note) == (None, (), None)
    assert {key: json.dumps(value) for key, value in found.items()} == meta


def test_the_same_features_are_found_by_the_same_words(old: Path) -> None:
    matching = "SELECT rowid FROM texts WHERE texts MATCH 'boat' ORDER BY rowid"
    before = as_it_was(old, matching)
    fires = as_it_was(old, "SELECT word, feature, share, lift, recall FROM fires")
    with reading(old) as connection:
        assert connection.execute(matching).fetchall() == before
        placed = connection.execute("SELECT * FROM fires ORDER BY word, place").fetchall()
    fires.sort(key=lambda row: (row[0], -row[2] * row[4], row[1]))
    assert [(word, *rest) for word, _, *rest, _ in placed] == fires
    assert {base for *_, base in placed} == {0}  # not known
    words = [row[0] for row in fires]
    assert [row[1] for row in placed] == [i - words.index(word) for i, word in enumerate(words)]
    with Index.open(old) as index:
        assert [hit.id for hit in index.search("boat")][:2] == [0, 1]
        assert {hit.id for hit in index.search("boat")} == {i for (i,) in before}


def test_what_is_new_in_it_works(old: Path) -> None:
    with reading(old) as connection:
        found = np.frombuffer(store.column(connection, "max_act"), "<f4")
        assert np.isnan(np.frombuffer(store.column(connection, "output_score"), "<f4")).all()
        stands = connection.execute("SELECT df FROM terms WHERE term = 'ocean'").fetchone()
        assert stands == (
            connection.execute("SELECT count(*) FROM texts WHERE texts MATCH 'ocean'").fetchone()
        )
    highest = [act for (act,) in as_it_was(old, "SELECT max_act FROM features ORDER BY id")]
    np.testing.assert_array_equal(found, np.float32(highest))
    notes.rename(old, 3, "Kitchens")
    store.keep_outputs(old, [(3, 0.5, 0.25)], {})
    with reading(old) as connection:
        feature = store.load(connection, [3])[0]
    assert feature.note is not None and feature.note.name == "Kitchens"
    assert (feature.output_score, feature.own_effect) == (0.5, 0.25)


def test_it_happens_once_and_leaves_one_file(old: Path) -> None:
    connect(old).close()
    made = old.stat().st_ino, old.read_bytes()
    connect(old).close()
    migrate(old)
    assert (old.stat().st_ino, old.read_bytes()) == made
    assert [p.name for p in old.parent.iterdir() if not p.name.endswith(".lock")] == [old.name]


def test_a_fresh_index_has_the_same_tables(old: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh.sqlite"
    store.write(fresh, [], {})
    connect(old).close()

    def shape(path: Path) -> dict[str, list[tuple]]:
        names = [name for (name,) in as_it_was(path, "SELECT name FROM sqlite_master")]
        # type, whether it may be missing, default, key
        return {
            n: as_it_was(
                path,
                f"SELECT name, type, \"notnull\", dflt_value, pk FROM pragma_table_info('{n}')",
            )
            for n in names
        }

    assert shape(old) == shape(fresh)
    version = "SELECT * FROM pragma_user_version, pragma_application_id"
    assert as_it_was(old, version) == as_it_was(fresh, version)


def test_two_processes_bring_it_up_to_date_at_once(old: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from saesteer.features import migrate\n"
        "with migrate.reading(Path(sys.argv[1])) as connection:\n"
        "    print(connection.execute('SELECT count(*) FROM fires').fetchone())"
    )
    command = [sys.executable, "-c", code, str(old)]
    cwd = Path(__file__).parent.parent
    both = [subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = []
    for one in both:
        with one:
            said.append(one.communicate()[0])
            assert one.returncode == 0
    assert said[0] == said[1] != ""


def test_a_damaged_old_index_stays_as_it_is(old: Path) -> None:
    page = next(
        root
        for root, name in as_it_was(old, "SELECT rootpage, name FROM sqlite_master")
        if name == "fires"
    )
    data = bytearray(OLD)
    data[4096 * (page - 1) : 4096 * page] = b"\xff" * 4096
    old.write_bytes(data)
    with pytest.raises(IndexingError, match="older version and can't be brought up to date") as e:
        connect(old)
    assert "saesteer index" in str(e.value)
    assert old.read_bytes() == data
    assert [p.name for p in old.parent.iterdir() if not p.name.endswith(".lock")] == [old.name]


def test_in_a_folder_that_cannot_be_written_it_says_what_to_do(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("readable")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    (folder / "features.sqlite").write_bytes(OLD)
    with read_only(folder), pytest.raises(IndexingError, match="saesteer index"):
        connect(folder / "features.sqlite")
    assert (folder / "features.sqlite").read_bytes() == OLD


def test_why_writing_failed_is_told_also_where_sqlite_has_undone_it_already(old: Path) -> None:
    connect(old).close()
    before = old.read_bytes()
    with pytest.raises(IndexingError, match=r"database or disk is full; free some space"):  # noqa: SIM117
        with writing(old) as connection:
            connection.execute("PRAGMA max_page_count = 1")  # as full as a disk can be
            connection.execute("INSERT INTO notes VALUES (1, NULL, 0, ?, 0)", ("x" * 10**6,))
    assert old.read_bytes() == before
    with pytest.raises(KeyError), writing(old) as connection:
        connection.execute("INSERT INTO tags VALUES ('sea', 1)")
        raise KeyError
    assert old.read_bytes() == before
