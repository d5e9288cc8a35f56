"""What a user writes about features: names, tags, stars and remarks, kept in the index itself.

Features are numbered by their SAE, so that notes hold for one SAE whatever text it was indexed on.
They outlive a new index (see `carry`), and go to another machine as a JSON file:

    {"saesteer_notes": 1, "sae_hash": …,
     "notes": [{"feature": 7, "name": "boats", "tags": ["sea"], "starred": true, "text": ""}, …]}
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from saesteer.core.files import write_json
from saesteer.errors import FeatureError, IndexingError
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Note
from saesteer.features.schema import storable

_FORMAT = 1
_NAME, _TAG, _TEXT = 200, 64, 20_000  # characters
# Rows asked for at once; SQLite takes 999 parameters at the least.
_CHUNK = 500


def rename(path: Path, feature: int, name: str | None) -> None:
    """Give a feature a name of the user's own; None takes it away.

    Raises:
        FeatureError: there is no such feature, or the name is empty or too long.
        IndexingError: the index can't be written.
    """
    with _note(path, feature) as (connection, _):
        value = None if name is None else _line(name, "name", _NAME)
        _set(connection, feature, "name", value)


def star(path: Path, feature: int, starred: bool = True) -> None:
    """Star a feature, or take the star away. Raises as `rename`."""
    with _note(path, feature) as (connection, _):
        _set(connection, feature, "starred", int(starred))


def remark(path: Path, feature: int, text: str) -> None:
    """Replace the user's remark on a feature; '' takes it away. Raises as `rename`."""
    with _note(path, feature) as (connection, _):
        _set(connection, feature, "text", _remark(text))


def tag(path: Path, feature: int, tags: Iterable[str]) -> None:
    """Add tags to a feature: single words, small and capital letters alike. Raises as `rename`."""
    with _note(path, feature) as (connection, _):
        rows = [(_tag(one), feature) for one in tags]
        connection.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", rows)


def untag(path: Path, feature: int, tags: Iterable[str]) -> None:
    """Take tags from a feature; raises as `rename`, and where it hasn't such a tag."""
    with _note(path, feature) as (connection, before):
        for one in map(_tag, tags):
            if one not in before.tags:
                has = f"it has {', '.join(before.tags)}" if before.tags else "it has none"
                raise FeatureError(f"feature {feature} has no tag {one!r}; {has}")
            connection.execute("DELETE FROM tags WHERE tag = ? AND feature = ?", (one, feature))


def export(path: Path, file: Path) -> int:
    """Write all notes of an index to a JSON file, and say how many features have one.

    Raises:
        IndexingError: the index can't be read. RunError: the file can't be written.
    """
    with reading(path) as connection:
        document = exported(connection)
    write_json(file, document)
    return len(document["notes"])


def exported(connection: sqlite3.Connection) -> dict[str, Any]:
    """All notes of an open index, as the document of this module's head."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'sae_hash'").fetchone()
    notes = read(connection)
    return {
        "saesteer_notes": _FORMAT,
        "sae_hash": json.loads(row[0]) if row else None,
        "notes": [{"feature": i, **asdict(notes[i])} for i in sorted(notes)],
    }


def load(path: Path, file: Path, *, force: bool = False) -> int:
    """Take notes from a file that `export` wrote into an index, and say how many.

    Where both have one, the file's name and remark are taken; tags and stars are joined. All of
    the file is taken, or nothing.

    Args:
        force: take them although they were written about another SAE.

    Raises:
        IndexingError: the file is no such file, or of another SAE; the index can't be written.
        FeatureError: it names features that the index hasn't.
    """
    document = _document(file)
    with writing(path) as connection:
        ours = exported(connection)["sae_hash"]
        if document["sae_hash"] != ours and not force:
            raise IndexingError(
                f"{file} holds notes on another SAE ({document['sae_hash']}) than {path} "
                f"({ours}): feature numbers mean other features; --force takes them all the same"
            )
        for feature, note in document["notes"]:
            _check(connection, feature)
            add(connection, feature, note)
    return len(document["notes"])


def read(connection: sqlite3.Connection, features: Iterable[int] | None = None) -> dict[int, Note]:
    """The notes on some features, or on all; those without one are left out."""
    rows, tags = [], []
    if features is None:
        rows = connection.execute("SELECT feature, name, starred, text FROM notes").fetchall()
        tags = connection.execute("SELECT feature, tag FROM tags ORDER BY tag").fetchall()
    else:
        ids = list(features)
        for part in (ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK)):
            where = f"WHERE feature IN ({', '.join('?' * len(part))})"
            select = f"SELECT feature, name, starred, text FROM notes {where}"
            rows += connection.execute(select, part).fetchall()
            select = f"SELECT feature, tag FROM tags {where} ORDER BY tag"
            tags += connection.execute(select, part).fetchall()
    named = {feature: (name, bool(starred), text) for feature, name, starred, text in rows}
    tagged: dict[int, list[str]] = {}
    for feature, one in tags:
        tagged.setdefault(feature, []).append(one)
    found = {}
    for feature in named.keys() | tagged.keys():
        name, starred, text = named.get(feature, (None, False, ""))
        found[feature] = Note(name, tuple(tagged.get(feature, ())), starred, text)
    return found


def add(connection: sqlite3.Connection, feature: int, note: Note) -> None:
    """Join a note to what there is on a feature; its name and remark are taken where it has any."""
    for column, value in (("name", note.name), ("starred", note.starred), ("text", note.text)):
        if value:
            _set(connection, feature, column, value)
    rows = ((one, feature) for one in note.tags)
    connection.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", rows)
    lay(connection, feature)


def lay(connection: sqlite3.Connection, feature: int) -> None:
    """Bring the full text of a feature's note up to date: its name, tags and remark.

    A label that a judge wrote stands for the name where the user gave none: the features' own text
    can't be changed after the index was made.
    """
    note = read(connection, [feature]).get(feature, Note())
    judged = connection.execute(
        "SELECT label FROM features WHERE id = ? AND label_source != 'evidence'", (feature,)
    ).fetchone()
    name = note.name or (judged[0] if judged else "")
    connection.execute("DELETE FROM noted WHERE rowid = ?", (feature,))
    if name or note.tags or note.text:
        connection.execute(
            "INSERT INTO noted (rowid, name, tags, text) VALUES (?, ?, ?, ?)",
            (feature, name, " ".join(note.tags), note.text),
        )


@contextmanager
def _note(path: Path, feature: int) -> Iterator[tuple[sqlite3.Connection, Note]]:
    """The note on a feature before a change; afterwards its full text is brought up to date."""
    with writing(path) as connection:
        _check(connection, feature)
        yield connection, read(connection, [feature]).get(feature, Note())
        connection.execute(
            "DELETE FROM notes WHERE feature = ? AND name IS NULL AND NOT starred AND text = ''",
            (feature,),
        )
        lay(connection, feature)


def _set(connection: sqlite3.Connection, feature: int, column: str, value: Any) -> None:
    connection.execute(
        f"INSERT INTO notes (feature, {column}, changed) VALUES (?, ?, ?) ON CONFLICT (feature) "
        f"DO UPDATE SET {column} = excluded.{column}, changed = excluded.changed",
        (feature, value, time.time()),
    )


def _check(connection: sqlite3.Connection, feature: int) -> None:
    whole = isinstance(feature, int) and not isinstance(feature, bool) and abs(feature) < 2**63
    if (
        not whole
        or not connection.execute("SELECT 1 FROM features WHERE id = ?", (feature,)).fetchone()
    ):
        n = connection.execute("SELECT count(*) FROM features").fetchone()[0]
        raise FeatureError(f"there is no feature {feature!r}: this SAE has features 0 to {n - 1}")


def _line(text: str, what: str, most: int) -> str:
    line = " ".join(storable(text).split())
    if not line or len(line) > most:
        raise FeatureError(f"a {what} has 1 to {most} characters, not {len(line)}")
    return line


def _tag(text: str) -> str:
    one = _line(text, "tag", _TAG).casefold()
    if " " in one or "," in one:
        raise FeatureError(f"{text!r} is no tag: a tag is one word; join words by a hyphen")
    return one


def _remark(text: str) -> str:
    if len(text) > _TEXT:
        raise FeatureError(f"a remark has {_TEXT:,} characters at most, not {len(text):,}")
    return storable(text)


def _document(file: Path) -> dict[str, Any]:
    """A file of notes, checked: its `notes` as (feature, Note)."""
    expected = "expected a file that `saesteer notes RUN --export FILE` wrote"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IndexingError(f"{file} can't be read ({error}); {expected}") from error
    if not isinstance(document, dict) or document.get("saesteer_notes") != _FORMAT:
        raise IndexingError(f"{file} holds no notes; {expected}")
    notes = []
    for number, one in enumerate(document.get("notes", ())):
        try:
            feature = one.pop("feature")
            if unknown := one.keys() - {field.name for field in fields(Note)}:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            name = one.get("name")
            notes.append(
                (
                    feature,
                    Note(
                        None if name is None else _line(name, "name", _NAME),
                        tuple(map(_tag, one.get("tags", ()))),
                        bool(one.get("starred", False)),
                        _remark(one.get("text", "")),
                    ),
                )
            )
        except (AttributeError, KeyError, TypeError, ValueError, FeatureError) as error:
            raise IndexingError(
                f"{file}: note {number} is malformed ({error}); {expected}"
            ) from error
    return {"sae_hash": document.get("sae_hash"), "notes": notes}
