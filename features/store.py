"""The feature index on disk: one SQLite file that is whole or isn't there. Its tables: `schema`.

Nothing here imports torch, transformers or numpy, so that a search starts at once.
"""

import gc
import json
import sqlite3
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from saesteer.core.files import written_aside
from saesteer.errors import IndexingError
from saesteer.features import fts, notes
from saesteer.features.carry import carried, outdated
from saesteer.features.database import AGAIN, locked
from saesteer.features.evidence import Vocab, pack, unpack
from saesteer.features.migrate import reading, writing
from saesteer.features.records import Entry, Feature
from saesteer.features.schema import (
    COLUMNS,
    MEASURED,
    SCHEMA,
    create,
    lay_column,
    lay_fires,
    storable,
)

# Features read at once; SQLite takes 999 parameters at the least.
_CHUNK = 500
_INSERT = f"INSERT INTO features ({COLUMNS}) VALUES ({', '.join('?' * len(COLUMNS.split(',')))})"


def write(path: Path, entries: Iterable[Entry], meta: Mapping[str, Any]) -> Path | None:
    """Write an index aside and rename it to `path`; what a user wrote is taken from the old one.

    Entries are read once, and none is kept.

    Args:
        entries: of features 0, 1, 2, …, in this order.
        meta: anything that JSON can hold; what made the index.

    Returns:
        The file that holds what could not be carried over (see `carry.Carried`), if anything.

    Warns:
        UserWarning: labels by a judge are out of date.

    Raises:
        IndexingError: the disk is full, the folder can't be written, another process writes, or
            the entries aren't numbered so.
    """
    # The lock is taken once the index is made, and held until it has its name.
    with ExitStack() as lock, written_aside(path) as aside, _swept_less():
        aside.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(aside)) as connection:
                # No journal: the file has another name until it is whole.
                connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
                _fill(connection, entries, meta)
                lock.enter_context(locked(path))
                kept = carried(path, connection, load)
                # The version comes last: a file without it is not whole.
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
                connection.commit()
        except sqlite3.Error as error:
            raise IndexingError(
                f"cannot write the index {path}: {error}; free some space, there and for "
                "temporary files (SQLITE_TMPDIR says where), or choose a run folder that you can "
                "write to"
            ) from error
    if kept.outdated:
        warnings.warn(outdated(path, kept.outdated), stacklevel=2)
    return kept.left


@contextmanager
def _swept_less() -> Iterator[None]:
    """Python's collector leaves alone what is there already.

    Records are made by the hundred thousand, so it would go through all of a loaded model's modules
    and libraries over and over: a quarter of the time that writing an index takes.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _fill(
    connection: sqlite3.Connection, entries: Iterable[Entry], meta: Mapping[str, Any]
) -> None:
    # What is only needed to write isn't loaded for a search.
    from saesteer.core.progress import progress

    create(connection)
    # One transaction over all, which without a journal takes no room; places within a word are
    # known when all features are.
    connection.execute(
        "CREATE TEMP TABLE fired "
        "(word INTEGER, feature INTEGER, share REAL, lift REAL, recall REAL, base REAL)"
    )
    vocab, words = Vocab(), dict[str, int]()
    counts = {"n_features": 0, "n_alive": 0}

    bars: list[Any] = []
    with ExitStack() as shown:

        def pairs() -> Iterator[tuple[int, Mapping[str, str]]]:
            for number, entry in enumerate(entries):
                feature = entry.feature
                if feature.id != number:
                    raise IndexingError(
                        f"entry {number} of the index is of feature {feature.id}; features must "
                        "come as 0, 1, 2, …: fill gaps with features that never fired"
                    )
                _write_feature(connection, feature, vocab, words)
                counts["n_features"] += 1
                counts["n_alive"] += feature.n_fired > 0
                yield feature.id, entry.texts
            # Only now, so that it doesn't stand among the bars of whoever makes the entries.
            bars.append(shown.enter_context(progress("write", 3, unit="step")))

        fts.build(connection, pairs())
        bars[0].update()
        lay_fires(connection, "temp.fired")
        connection.execute("DROP TABLE temp.fired")
        bars[0].update()
        for name in MEASURED:
            lay_column(connection, name)
        connection.executemany(
            "INSERT INTO words (rowid, text) VALUES (?, ?)",
            ((i, word) for word, i in words.items()),
        )
        connection.executemany(
            "INSERT INTO vocab VALUES (?, ?)", ((i, storable(t)) for i, t in vocab.texts.items())
        )
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            ((k, json.dumps(v)) for k, v in {**meta, **counts}.items()),
        )
        bars[0].update()


def _write_feature(
    connection: sqlite3.Connection, f: Feature, vocab: Vocab, words: dict[str, int]
) -> None:
    figures = (f.confidence, f.density, f.mean_act, f.max_act, f.n_fired, f.breadth, f.company)
    connection.execute(
        _INSERT,
        (
            f.id,
            storable(f.label),
            *figures,
            f.decoder_norm,
            f.label_source,
            f.label_score,
            f.output_score,
            f.own_effect,
            None if f.token_set is None else storable(f.token_set),
            f.token_set_score,
        ),
    )
    connection.execute("INSERT INTO evidence VALUES (?, ?)", (f.id, pack(f, vocab)))
    by_word = {
        words.setdefault(storable(word.text.casefold()), len(words) + 1): word for word in f.words
    }
    connection.executemany(
        "INSERT INTO temp.fired VALUES (?, ?, ?, ?, ?, ?)",
        [(i, f.id, w.share, w.lift, w.recall(f.density), w.base) for i, w in by_word.items()],
    )


def load(
    connection: sqlite3.Connection, features: Sequence[int], *, brief: bool = False
) -> list[Feature]:
    """Records of some features, in the order asked for; those that aren't there are left out.

    Args:
        brief: of the evidence only the first words and the strongest example, for a list of hits.

    Raises:
        IndexingError: a record is damaged.
    """
    found: dict[int, Feature] = {}
    texts = _Texts(connection)
    written = notes.read(connection, features)
    columns = ", ".join(f"f.{column.strip()}" for column in COLUMNS.split(","))
    for part in (features[i : i + _CHUNK] for i in range(0, len(features), _CHUNK)):
        rows = connection.execute(
            f"SELECT e.data, {columns} FROM features AS f JOIN evidence AS e ON e.id = f.id "
            f"WHERE f.id IN ({', '.join('?' * len(part))})",
            part,
        ).fetchall()
        for data, *row in rows:
            feature = replace(Feature(*row), note=written.get(row[0]))
            try:
                found[feature.id] = unpack(feature, data, texts, brief=brief)
            except (ValueError, LookupError, TypeError, struct.error, zlib.error) as error:
                raise IndexingError(
                    f"the index's record of feature {feature.id} is damaged ({error}); {AGAIN}"
                ) from error
    return [found[i] for i in features if i in found]


class _Texts(dict[int, str]):
    """The texts of the vocabulary, by number, read as they are needed."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def __missing__(self, number: int) -> str:
        row = self._connection.execute("SELECT text FROM vocab WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise KeyError(f"no text {number}")
        self[number] = row[0]
        return row[0]


def read_meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """What made an index."""
    rows = connection.execute("SELECT key, value FROM meta").fetchall()
    return {key: json.loads(value) for key, value in rows}


def column(connection: sqlite3.Connection, name: str) -> bytes:
    """One figure of `schema.MEASURED` of all features: float32, little-endian, NaN: not measured.

    Raises:
        IndexingError: there is no such figure.
    """
    row = connection.execute("SELECT data FROM columns WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise IndexingError(f"the index has no column {name!r}; it has {', '.join(MEASURED)}")
    return row[0]


def keep_outputs(
    path: Path,
    scores: Iterable[tuple[int, float | None, float | None]],
    settings: Mapping[str, Any],
) -> None:
    """Keep effects of features in an index, with what they were measured with.

    Those of the same features that were there are replaced.

    Args:
        scores: (feature, output_score, own_effect); None where a figure means nothing.
        settings: anything that JSON can hold.

    Raises:
        IndexingError: the index can't be written.
    """
    how = json.dumps(settings, sort_keys=True)
    rows = [(feature, score, own, how) for feature, score, own in scores]
    with writing(path) as connection:
        connection.executemany("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?, ?)", rows)
        connection.executemany(
            "UPDATE features SET output_score = ?, own_effect = ? WHERE id = ?",
            [(score, own, feature) for feature, score, own, _ in rows],
        )
        for name in ("output_score", "own_effect"):
            lay_column(connection, name)


def measured(path: Path, settings: Mapping[str, Any] | None = None) -> set[int]:
    """The features whose effects are kept in an index, also those that can't be told.

    Args:
        settings: only those measured with these; None: with any.

    Raises:
        IndexingError: the index can't be read.
    """
    how = None if settings is None else json.dumps(settings, sort_keys=True)
    with reading(path) as connection:
        rows = connection.execute(
            "SELECT feature FROM outputs WHERE ? IS NULL OR settings = ?", (how, how)
        )
        return {feature for (feature,) in rows.fetchall()}
