"""The index as a file: opened for reading or writing, refused in one line where it is no index.

Many read while one writes: writers hold a lock beside the file for one short transaction, and the
file is in rollback-journal mode, so that at rest it is a single file that opens from read-only
media too. Two things follow from how SQLite does this:

- A process must not open the file by other means while it has connections to it: closing it would
  drop their POSIX locks.
- A connection to an index that was made again since still looks for the journal by its name, and
  would take that of a writer to the new one for its own. So writers open the file once they hold
  the lock, and readers ask in a transaction that `begun` has begun.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from saesteer.errors import IndexingError
from saesteer.features.schema import APPLICATION

AGAIN = "make it with `saesteer index`"
# An index is made again in minutes, not many times in the moment between opening and reading it.
TRIES = 10
# Seconds that a reader waits for a commit, and a writer for another writer.
_BUSY, _LOCK = 10.0, 30.0


def opened(path: Path, *, write: bool = False) -> tuple[sqlite3.Connection, int]:
    """A connection to an index, and its schema's version (0: it is not whole).

    Args:
        write: for writing; the caller holds the lock of writers.

    Raises:
        IndexingError: it is missing, truncated, or no index; or can't be written.
    """
    if not path.is_file():
        raise IndexingError(f"there is no feature index {path}; {AGAIN}")
    try:
        connection, application, version = _opened(path, "rw") if write else _for_reading(path)
    except sqlite3.Error as error:
        raise _refused(path, error) from error
    if application != APPLICATION:
        connection.close()
        raise IndexingError(f"{path} is no feature index but another SQLite file; {AGAIN}")
    return connection, version


def _for_reading(path: Path) -> tuple[sqlite3.Connection, int, int]:
    for _ in range(TRIES - 1):
        try:
            return _opened(path, "ro")
        except sqlite3.OperationalError:
            # Either the index was made again in this moment, and a writer is at the new one; or a
            # writer was killed amid a commit: only a connection that may write can undo its half.
            if journal(path).exists():
                with locked(path):
                    _opened(path, "rw")[0].close()
    return _opened(path, "ro")


def _opened(path: Path, mode: str) -> tuple[sqlite3.Connection, int, int]:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error:
        connection.close()
        raise
    return connection, application, version


def _refused(path: Path, error: sqlite3.Error) -> IndexingError:
    try:
        with path.open("rb") as file:
            header = file.read(100)
        size = path.stat().st_size
    except OSError as unreadable:
        return IndexingError(f"{path} can't be read ({unreadable.strerror}); {AGAIN}")
    if not header.startswith(b"SQLite format 3\0"):
        return IndexingError(f"{path} is no feature index; {AGAIN}")
    page = int.from_bytes(header[16:18], "big")
    whole = (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big")
    if size < whole:
        return IndexingError(f"{path} is cut off: {size} bytes of {whole}; {AGAIN} again")
    return IndexingError(f"{path} can't be read ({error}); {AGAIN}")


def begun(connection: sqlite3.Connection) -> bool:
    """Begin to read one state of an index; end with `connection.rollback()`, soon.

    Until then writers wait with their commit. False: nothing has begun, since the index was made
    again or a writer was killed; open it again.
    """
    try:
        connection.execute("BEGIN")
        connection.execute("SELECT 1 FROM meta").fetchone()
    except sqlite3.OperationalError:
        connection.rollback()
        return False
    return True


def journal(path: Path) -> Path:
    """Where SQLite keeps what undoes a transaction."""
    return path.with_name(f"{path.name}-journal")


def identity(path: Path) -> tuple[int, int]:
    """Device and inode of the file: they change when an index is made again.

    Raises:
        IndexingError: it is gone.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise IndexingError(f"there is no feature index {path} any more; {AGAIN}") from error
    return about.st_dev, about.st_ino


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of writers to an index, which ends with the process, however that ends.

    Raises:
        IndexingError: another process held it for half a minute, or the folder can't be written.
    """
    try:
        lock = path.with_name(f".{path.name}.lock").open("a+")
    except OSError as error:
        raise IndexingError(
            f"cannot write beside {path} ({error.strerror}); copy the run to a folder that you "
            "can write to, or make the index there with `saesteer index`"
        ) from error
    with lock:
        deadline = time.monotonic() + _LOCK
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise IndexingError(
                        f"another process is writing to {path} (process id {lock.read() or '?'}); "
                        "wait for it and try again"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                raise IndexingError(
                    f"{path} can't be locked ({error.strerror}), so two writers could mix; keep "
                    "the run on a local disk"
                ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
