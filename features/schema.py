"""The tables of an index, version 3.

meta      key, value (JSON): the SAE's hash and stamp, the model's fingerprint, counts, …
features  one row a feature: what a hit list and a strength need
vocab     each text that the evidence names, once: 0 and up are token ids, below 0 other texts
evidence  one blob a feature (see `evidence`)
words     whole words, searchable (FTS5)
fires     which features fire on which words, best first: share, lift and recall, and how frequent
          the word is (0: not known)
columns   one figure of all features at once: float32, little-endian, NaN where not measured
outputs   output scores and what they were measured with
judged    labels that a model wrote, and how well they did
notes, tags, noted   what the user wrote, and its full text (FTS5)
texts, terms, frequent   the features' full text (see `fts`)
"""

import array
import math
import sqlite3
import sys
from collections.abc import Iterable

SCHEMA = 3
APPLICATION = 0x53414553  # "SAES" in the file's header: told from other SQLite files
TOKENIZER = "porter unicode61"
PAGE = 4096
# Columns of `features`: the first fields of `records.Feature`, in their order.
COLUMNS = (
    "id, label, confidence, density, mean_act, max_act, n_fired, breadth, company, "
    "decoder_norm, label_source, label_score, output_score, own_effect, token_set, token_set_score"
)
# Figures that have a row in `columns`.
MEASURED = ("density", "max_act", "output_score", "own_effect")
# Features kept a word: nobody pages past them, and what matches a word of half of all features
# isn't told by them.
_FIRES = 1_000

# What version 1 had no column for: all may be missing.
ADDED = (
    "decoder_norm REAL",
    "label_source TEXT NOT NULL DEFAULT 'evidence'",
    "label_score REAL",
    "output_score REAL",
    "own_effect REAL",
    "token_set TEXT",
    "token_set_score REAL",
)
_FEATURES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE features (
    id INTEGER PRIMARY KEY, label TEXT NOT NULL, confidence REAL NOT NULL,
    density REAL NOT NULL, mean_act REAL NOT NULL, max_act REAL NOT NULL,
    n_fired INTEGER NOT NULL, breadth REAL NOT NULL, company REAL NOT NULL,
    {", ".join(ADDED)});
CREATE TABLE evidence (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(text, tokenize = '{TOKENIZER}');
"""
_FIRED = """
CREATE TABLE fires (
    word INTEGER NOT NULL, place INTEGER NOT NULL, feature INTEGER NOT NULL,
    share REAL NOT NULL, lift REAL NOT NULL, recall REAL NOT NULL, base REAL NOT NULL,
    PRIMARY KEY (word, place)) WITHOUT ROWID;
"""
# Beside what version 1 had.
_BESIDE = f"""
CREATE TABLE vocab (id INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE columns (name TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE outputs (
    feature INTEGER PRIMARY KEY, score REAL, own REAL, settings TEXT NOT NULL);
CREATE TABLE judged (
    feature INTEGER NOT NULL, key TEXT NOT NULL, label TEXT NOT NULL, detection REAL,
    fuzzing REAL, n INTEGER, model TEXT, PRIMARY KEY (feature, key));
CREATE TABLE notes (
    feature INTEGER PRIMARY KEY, name TEXT, starred INTEGER NOT NULL DEFAULT 0,
    text TEXT NOT NULL DEFAULT '', changed REAL NOT NULL);
CREATE TABLE tags (
    tag TEXT NOT NULL, feature INTEGER NOT NULL, PRIMARY KEY (tag, feature)) WITHOUT ROWID;
CREATE INDEX tags_of ON tags (feature);
CREATE VIRTUAL TABLE noted USING fts5(name, tags, text, tokenize = '{TOKENIZER}');
"""


def create(connection: sqlite3.Connection) -> None:
    """All tables of a new index but `fires`, which `lay_fires` makes, and those of `fts`."""
    connection.executescript(
        f"PRAGMA page_size = {PAGE}; PRAGMA application_id = {APPLICATION}; {_FEATURES} {_BESIDE}"
    )


def extend(connection: sqlite3.Connection) -> None:
    """Add to a version 1 what version 2 has beside it."""
    for column in ADDED:
        connection.execute(f"ALTER TABLE features ADD COLUMN {column}")
    connection.executescript(_BESIDE)


def lay_fires(connection: sqlite3.Connection, source: str) -> None:
    """Make `fires` of a table (word, feature, share, lift, recall, base): of each word the best
    first.

    The order is by recall × share, the feature's number where they are equal.
    """
    connection.execute(_FIRED)
    connection.execute(
        "INSERT INTO fires SELECT word, place, feature, share, lift, recall, base FROM ("
        "SELECT *, row_number() OVER (PARTITION BY word ORDER BY recall * share DESC, feature) - 1 "
        f"AS place FROM {source}) WHERE place < {_FIRES} ORDER BY word, place"
    )


def lay_column(connection: sqlite3.Connection, name: str) -> None:
    """Write one of `MEASURED` into `columns`, from `features`."""
    if name not in MEASURED:
        raise ValueError(f"no column {name!r}; there are {', '.join(MEASURED)}")
    rows = connection.execute(f"SELECT {name} FROM features ORDER BY id")
    data = float32(value for (value,) in rows)
    connection.execute("INSERT OR REPLACE INTO columns VALUES (?, ?)", (name, data))


def float32(values: Iterable[float | None]) -> bytes:
    """Little-endian float32; None is NaN."""
    found = array.array("f", (math.nan if value is None else value for value in values))
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def storable(text: str) -> str:
    """Without what SQLite can't hold as text: lone surrogates read '?'."""
    return text.encode("utf-8", "replace").decode()
