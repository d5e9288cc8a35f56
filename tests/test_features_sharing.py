"""The index file among processes: many read while one writes, is killed, or has no room."""

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from saesteer.errors import IndexingError, RunError
from saesteer.features import database, notes, store
from saesteer.features.migrate import connect, reading
from saesteer.features.records import Feature
from tests.some_features import SOME, an_entry, read_only

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "features.sqlite"
    store.write(path, SOME, {"sae_hash": "abc"})
    return path


def loaded(path: Path, ids: range) -> list[Feature]:
    with reading(path) as connection:
        return store.load(connection, ids)


def rows(path: Path, sql: str) -> list[tuple]:
    with reading(path) as connection:
        return connection.execute(sql).fetchall()


def in_another_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    imports = "import sys\nfrom pathlib import Path\nfrom saesteer.features import notes, store\n"
    command = [sys.executable, "-c", imports + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)


# Two rows are always written together, and every fourth time the whole index is made again.
WRITER = """
import time
from tests.some_features import SOME
path, end, i = Path(sys.argv[1]), time.monotonic() + 2, 0
while time.monotonic() < end:
    i += 1
    if i % 4:
        with store.writing(path) as connection:
            for feature in (0, 1):
                connection.execute("UPDATE notes SET text = ? WHERE feature = ?", (str(i), feature))
    else:
        store.write(path, SOME, {"sae_hash": "abc"})
print(i)
"""


def test_readers_see_whole_states_while_another_process_writes(path: Path) -> None:
    for feature in (0, 1):
        notes.remark(path, feature, "0")
    connection, identity = connect(path), database.identity(path)
    again, seen = 0, set()
    query = "SELECT rowid FROM texts WHERE texts MATCH 'boat' ORDER BY rowid"
    with in_another_process(WRITER, path) as writer:
        while writer.poll() is None:
            while database.identity(path) != identity or not database.begun(connection):
                connection.close()
                identity, connection = database.identity(path), connect(path)
                again += 1
            one, two = connection.execute("SELECT text FROM notes ORDER BY feature").fetchall()
            assert one == two
            seen.add(one)
            got = store.load(connection, range(4))
            assert [replace(f, note=None) for f in got] == [entry.feature for entry in SOME]
            assert connection.execute(query).fetchall() == [(0,), (1,)]
            connection.rollback()
        assert writer.returncode == 0
        last = int(writer.communicate()[0])
    connection.close()
    assert last > 8 and len(seen) > 3 and again > 3
    # The last that was written is there, though the index was made again in between.
    final = last if last % 4 else last - 1
    assert rows(path, "SELECT DISTINCT text FROM notes") == [(str(final),)]


def test_what_processes_write_at_once_is_all_there(path: Path) -> None:
    tagger = "for i in range(60): notes.tag(Path(sys.argv[1]), i % 4, [f'{sys.argv[2]}{i}'])"
    maker = (
        "from tests.some_features import SOME\n"
        "for _ in range(60): store.write(Path(sys.argv[1]), SOME, {'sae_hash': 'abc'})"
    )
    codes = [(tagger, "a"), (tagger, "b"), (maker, "")]
    with ExitStack() as stack:
        writers = [stack.enter_context(in_another_process(c, path, name)) for c, name in codes]
        assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(rows(path, "SELECT tag FROM tags")) == 120


def killed_amid_a_commit(path: Path) -> None:
    """A process that dies when half of its transaction is in the file."""
    code = (
        "import os\n"
        "with store.writing(Path(sys.argv[1])) as connection:\n"
        "    connection.execute('PRAGMA cache_size = 1')\n"
        "    connection.execute('UPDATE features SET label = ?', ('half' * 3_000,))\n"
        "    connection.execute('UPDATE evidence SET data = zeroblob(9000)')\n"
        "    os._exit(9)"
    )
    with in_another_process(code, path) as killed:
        assert killed.wait() == 9


def test_a_writer_killed_amid_a_commit_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    killed_amid_a_commit(path)
    assert database.journal(path).stat().st_size > 0
    assert path.read_bytes() != before
    assert loaded(path, range(4)) == [entry.feature for entry in SOME]
    assert not database.journal(path).exists()


@pytest.mark.parametrize("removed", [False, True])
def test_its_journal_does_not_spoil_the_index_made_next(path: Path, removed: bool) -> None:
    notes.star(path, 3)
    killed_amid_a_commit(path)
    if removed:
        path.unlink()
    others = [an_entry(i) for i in (1, 2, 3)]
    assert store.write(path, [SOME[0], *others], {"sae_hash": "abc"}) is None
    assert [f.label for f in loaded(path, range(4))] == ["sea, boat, wave", *["(never fired)"] * 3]
    assert rows(path, "SELECT feature, starred FROM notes") == ([] if removed else [(3, 1)])
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_writer_waits_for_another_and_says_whom_it_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOCK", 0.1)
    with database.locked(path), pytest.raises(IndexingError, match=f"process id {os.getpid()}"):
        notes.star(path, 0)
    notes.star(path, 0)


def test_a_folder_that_cannot_be_written_can_be_read(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("readable")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    path = folder / "features.sqlite"
    store.write(path, SOME, {})
    (folder / ".features.sqlite.lock").unlink()
    with read_only(folder):
        assert loaded(path, range(4)) == [entry.feature for entry in SOME]
        for write in (lambda: notes.star(path, 0), lambda: store.keep_outputs(path, [], {})):
            with pytest.raises(IndexingError, match="copy the run to a folder that you can write"):
                write()
        with pytest.raises((IndexingError, RunError), match="can write"):
            store.write(path, SOME, {})
    notes.star(path, 0)


def test_a_full_disk_leaves_the_old_index(path: Path) -> None:
    notes.star(path, 0)
    before = path.read_bytes(), sorted(path.parent.iterdir())
    code = (
        "import resource\n"
        "from saesteer.errors import IndexingError\n"
        "from tests.some_features import SOME, an_entry\n"
        "path, limit = Path(sys.argv[1]), int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "entries = [*SOME, *(an_entry(i, **{f'word{i}': 0.5}) for i in range(4, 2000))]\n"
        "try: store.write(path, entries, {'sae_hash': 'abc'})\n"
        "except IndexingError as error: print(error)"
    )
    for limit in (5_000, len(before[0]) - 4_096, 200_000):
        with in_another_process(code, path, limit) as writer:
            assert "free some space" in writer.communicate()[0]
        assert (path.read_bytes(), sorted(path.parent.iterdir())) == before
