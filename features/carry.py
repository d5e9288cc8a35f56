"""What outlives an index that is made again: the user's notes, and what was dear to measure."""

import sqlite3
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from saesteer.core.files import write_json
from saesteer.errors import IndexingError
from saesteer.features import notes
from saesteer.features.database import journal, opened
from saesteer.features.records import Feature
from saesteer.features.schema import SCHEMA, lay_column

# Features read at once, and those with labels out of date that are named.
_CHUNK, _NAMED = 500, 12
# The first version that holds what is carried over.
_WITH_NOTES = 2
Load = Callable[[sqlite3.Connection, Sequence[int]], list[Feature]]


class Carried(NamedTuple):
    """What became of an old index.

    left: where notes were put that the new index can't hold, or the old index itself, kept under
    another name because it can't be read; None where all was carried over. outdated: features
    whose labels by a judge were left out, since the evidence that they were written from is
    another now.
    """

    left: Path | None = None
    outdated: tuple[int, ...] = ()


def carried(path: Path, new: sqlite3.Connection, load: Load) -> Carried:
    """Bring over what the index at `path` has that a new one can't make by itself.

    Notes go into the new index where both are of one SAE, else into notes-HASH.json beside it. Of
    one SAE and one model, effects and judged labels with their scores are kept too; a label stands
    again where its feature's evidence is the same. The caller holds the lock of writers, and
    renames afterwards.

    Args:
        load: gives full records of an index (`store.load`).

    Raises:
        IndexingError, RunError: the folder can't be written.
    """
    kept = _kept(path, new, load) if path.exists() else Carried()
    # Left behind, a journal would undo the old index's last transaction in the new one.
    with suppress(FileNotFoundError):
        journal(path).unlink()
    return kept


def outdated(path: Path, features: Sequence[int]) -> str:
    """What is to be said of features of the index at `path` whose labels were left out."""
    numbers = ",".join(map(str, features[:_NAMED])) + (",…" if len(features) > _NAMED else "")
    return (
        f"{len(features)} of a judge's labels are out of date: what they were written from has "
        "changed. Those features have plain labels again; for new ones: "
        f"saesteer judge {path.parent} --features {numbers}"
    )


def _kept(path: Path, new: sqlite3.Connection, load: Load) -> Carried:
    try:
        old, version = opened(path, write=True)
        with closing(old):
            if _WITH_NOTES <= version <= SCHEMA:
                return _carried(path, old, new, load)
    except IndexingError:
        version = 0
    if 1 <= version < SCHEMA:
        return Carried()  # there were no notes yet
    kept = _free(path.with_name(f"{path.name}.unreadable"))
    _rename(path, kept)
    return Carried(kept)


def _carried(path: Path, old: sqlite3.Connection, new: sqlite3.Connection, load: Load) -> Carried:
    before, now = (dict(_rows(index, "SELECT key, value FROM meta")) for index in (old, new))
    if any(before.get(key) != now.get(key) for key in ("sae_hash", "imported_from")):
        if not next(_rows(old, "SELECT 1 FROM notes UNION SELECT 1 FROM tags"), None):
            return Carried()
        document = notes.exported(old)
        file = _free(path.with_name(f"notes-{str(document['sae_hash'])[:16]}.json"))
        write_json(file, document)
        return Carried(file)
    # As they are: when a note was changed, too.
    for table in ("notes", "tags"):
        _copy(old, new, table)
    for feature in notes.read(new):
        notes.lay(new, feature)
    # Those of the judge here: an import has labels that others judged, and brings them anew.
    own = "SELECT 1 FROM judged AS j WHERE j.feature = f.id AND j.label = f.label"
    where = f"label_source = 'judge' AND EXISTS ({own})"
    labels = dict(_rows(old, f"SELECT id, label FROM features AS f WHERE {where}"))
    if before.get("model_fingerprint") != now.get("model_fingerprint"):
        return Carried(None, tuple(labels))
    _copy(old, new, "judged")
    # What a feature does was measured in units of its highest activation, and on the tokens that
    # it fired on: of another text both are others.
    figures = "SELECT id, max_act, n_fired FROM features"
    alike = {row[0] for row in set(_rows(old, figures)).intersection(_rows(new, figures))}
    _copy(old, new, "outputs", alike)
    new.execute(
        "UPDATE features SET (output_score, own_effect) = "
        "(SELECT score, own FROM outputs WHERE feature = id) "
        "WHERE output_score IS NULL AND id IN (SELECT feature FROM outputs)"
    )
    for name in ("output_score", "own_effect"):
        lay_column(new, name)
    standing = _relabelled(new, labels, load)
    return Carried(None, tuple(feature for feature in labels if feature not in standing))


def _relabelled(new: sqlite3.Connection, labels: Mapping[int, str], load: Load) -> set[int]:
    """Put a judge's labels up again where their evidence is the same, and say where it is."""
    # Needed by few: what writes labels isn't loaded for a search.
    from saesteer.features.judge import key, lay_label, prompt

    standing = set()
    ids = list(labels)
    for part in (ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK)):
        for feature in load(new, part):
            text = prompt(feature)
            # Of several writers' labels the one that stood there before comes first.
            written = new.execute(
                "SELECT key, label, model FROM judged WHERE feature = ? ORDER BY label != ?",
                (feature.id, labels[feature.id]),
            ).fetchall()
            for its_key, label, model in written:
                if its_key == key(text, model or ""):
                    lay_label(new, feature.id, label, its_key)
                    standing.add(feature.id)
                    break
    return standing


def _copy(
    old: sqlite3.Connection, new: sqlite3.Connection, table: str, only: Container[int] | None = None
) -> None:
    """Copy a table's rows; only: those of these features, by the first column."""
    width = len(new.execute(f"SELECT * FROM {table} LIMIT 0").description)
    marks = ", ".join("?" * width)
    rows = _rows(old, f"SELECT * FROM {table}")
    kept = (row for row in rows if only is None or row[0] in only)
    new.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", kept)


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
