"""Open an index of any version as one of this version."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from saesteer.core.files import written_aside
from saesteer.errors import IndexingError
from saesteer.features import fts
from saesteer.features.database import AGAIN, TRIES, begun, locked, opened
from saesteer.features.schema import MEASURED, SCHEMA, extend, lay_column, lay_fires


def connect(path: Path) -> sqlite3.Connection:
    """Open an index for reading only; one of an older version is brought up to date first.

    Raises:
        IndexingError: it is missing, truncated, no index, or made by a newer saesteer; or it is
            old and its folder can't be written.
    """
    connection, version = opened(path)
    if version == SCHEMA:
        return connection
    connection.close()
    if not 1 <= version < SCHEMA:
        why = (
            "made by a newer saesteer: update saesteer, or " if version > SCHEMA else "not whole: "
        )
        raise IndexingError(f"{path} has version {version}, expected {SCHEMA}; it was {why}{AGAIN}")
    migrate(path)
    return opened(path)[0]


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One state of an index, to be read soon: writers wait with their commit meanwhile.

    Raises:
        IndexingError: as `connect`.
    """
    for _ in range(TRIES):
        with closing(connect(path)) as connection:
            if begun(connection):
                yield connection
                return
    raise IndexingError(f"{path} can't be read: it is written to all the time; try again later")


def migrate(path: Path) -> None:
    """Bring an index of an older version up to date, on a copy that is then renamed.

    What that version hadn't measured stays unknown until the index is made again.

    Raises:
        IndexingError: it is damaged, or its folder can't be written.
    """
    with locked(path), closing(opened(path, write=True)[0]) as old:
        # Another process may have done it while this one waited for the lock.
        version = old.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA:
            return
        try:
            with written_aside(path) as aside, closing(sqlite3.connect(aside)) as connection:
                old.backup(connection)
                connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
                connection.execute("ALTER TABLE fires ADD COLUMN base REAL NOT NULL DEFAULT 0")
                if version == 1:
                    _from_1(connection)
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
                connection.commit()
        except sqlite3.Error as error:
            raise IndexingError(
                f"{path} is of an older version and can't be brought up to date ({error}); {AGAIN}"
            ) from error


def _from_1(connection: sqlite3.Connection) -> None:
    extend(connection)
    connection.execute("ALTER TABLE fires RENAME TO fired")
    lay_fires(connection, "fired")
    connection.execute("DROP TABLE fired")
    for name in MEASURED:
        lay_column(connection, name)
    fts.finish(connection)


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction on an index, alone among writers: committed, or undone where the body raises.

    Keep the body short, with no computing in it: other writers wait for it, and readers wait for
    its commit.

    Raises:
        IndexingError: as `connect`; another process is writing; the index can't be written.
    """
    connect(path).close()  # brings an old one up to date
    with locked(path), closing(opened(path, write=True)[0]) as connection:
        connection.isolation_level = None  # transactions are begun here, not by the module
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                # SQLite has undone it by itself where the disk is full, and says that there is
                # nothing to undo: what is to be told is why.
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise IndexingError(
                f"cannot write to {path}: {error}; free some space, or copy the run to a folder "
                "that you can write to"
            ) from error
