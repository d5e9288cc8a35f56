"""What outlives an index that is made again: the user's notes, and what was dear to measure."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from saesteer.core.files import write_json
from saesteer.errors import IndexingError
from saesteer.features import notes
from saesteer.features.database import journal, opened
from saesteer.features.schema import SCHEMA, lay_column


def carried(path: Path, new: sqlite3.Connection) -> Path | None:
    """Bring over what the index at `path` has that a new one can't make by itself.

    Notes go into the new index where both are of one SAE, else into notes-HASH.json beside it. Of
    one SAE and one model, effects and judged labels' scores are kept too (a judged label is
    asked for again, and found there while its evidence is the same). The caller holds the lock of
    writers, and renames afterwards.

    Returns:
        Where notes were put that the new index can't hold, or the old index itself, kept under
        another name because it can't be read; None where all was carried over.

    Raises:
        IndexingError, RunError: the folder can't be written.
    """
    kept = _kept(path, new) if path.exists() else None
    # Left behind, a journal would undo the old index's last transaction in the new one.
    with suppress(FileNotFoundError):
        journal(path).unlink()
    return kept


def _kept(path: Path, new: sqlite3.Connection) -> Path | None:
    try:
        old, version = opened(path, write=True)
        with closing(old):
            if version == SCHEMA:
                return _carried(path, old, new)
    except IndexingError:
        version = 0
    if 1 <= version < SCHEMA:
        return None  # there were no notes yet
    kept = _free(path.with_name(f"{path.name}.unreadable"))
    _rename(path, kept)
    return kept


def _carried(path: Path, old: sqlite3.Connection, new: sqlite3.Connection) -> Path | None:
    before, now = (dict(_rows(index, "SELECT key, value FROM meta")) for index in (old, new))
    if any(before.get(key) != now.get(key) for key in ("sae_hash", "imported_from")):
        if not next(_rows(old, "SELECT 1 FROM notes UNION SELECT 1 FROM tags"), None):
            return None
        document = notes.exported(old)
        file = _free(path.with_name(f"notes-{str(document['sae_hash'])[:16]}.json"))
        write_json(file, document)
        return file
    # As they are: when a note was changed, too.
    for table in ("notes", "tags"):
        _copy(old, new, table)
    for feature in notes.read(new):
        notes.lay(new, feature)
    if before.get("model_fingerprint") == now.get("model_fingerprint"):
        _copy(old, new, "judged")
        _copy(old, new, "outputs")
        new.execute(
            "UPDATE features SET (output_score, own_effect) = "
            "(SELECT score, own FROM outputs WHERE feature = id) "
            "WHERE output_score IS NULL AND id IN (SELECT feature FROM outputs)"
        )
        for name in ("output_score", "own_effect"):
            lay_column(new, name)
    return None


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> None:
    width = len(new.execute(f"SELECT * FROM {table} LIMIT 0").description)
    marks = ", ".join("?" * width)
    rows = _rows(old, f"SELECT * FROM {table}")
    new.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)


def _rows(connection: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """Rows, read as they are asked for: damage in them is told from a failure to write others."""
    try:
        yield from connection.execute(sql)
    except sqlite3.Error as error:
        raise IndexingError(f"the old index can't be read ({error})") from error


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that there is none of yet."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def _rename(path: Path, to: Path) -> None:
    try:
        path.rename(to)
        if journal(path).exists():
            journal(path).rename(journal(to))
    except OSError as error:
        raise IndexingError(
            f"{path} can't be read and can't be renamed either ({error.strerror}); remove it, or "
            "choose a run folder that you can write to"
        ) from error
