"""The feature index on disk: one SQLite file that is whole or isn't there.

    meta      key, value: the SAE's hash, the model's fingerprint, the hook point, counts, …
    features  one row a feature: what a hit list and a strength need
    evidence  one blob a feature (zlib JSON): tokens, promoted and suppressed tokens, examples
    words     whole words, searchable (FTS5)
    fires     which features fire on which words: share, lift and recall
    texts     searchable text of each feature, by field (FTS5)

Nothing here imports torch, transformers or numpy, so that a search starts at once.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saesteer.core.files import written_aside
from saesteer.errors import IndexingError

SCHEMA = 1
_APPLICATION = 0x53414553  # "SAES" in the file's header: told from other SQLite files
_PAGE = 4096
_TOKENIZER = "porter unicode61"
# Searchable fields, in the order of the columns of `texts`.
FIELDS = ("label", "words", "near", "promotes", "contexts")


@dataclass(frozen=True)
class TokenStat:
    """A token on which a feature fires.

    share: of the feature's activation mass; count: times it fired there; lift: P(token | fires) /
    P(token); base: P(token) among all tokens counted.
    """

    id: int
    text: str
    share: float
    count: int
    lift: float
    base: float


@dataclass(frozen=True)
class WordStat:
    """A whole word on which a feature fires; fields as in `TokenStat`."""

    text: str
    share: float
    lift: float
    base: float

    def recall(self, density: float) -> float:
        """P(fires | word), from the feature's density."""
        return min(1.0, self.lift * density)


@dataclass(frozen=True)
class Example:
    """A context in which a feature fires: the tokens around, their text, its activations there.

    firing: which of them the example is about; value: the activation there; context, position:
    where in the text it was; document: of which document, None where not known.
    """

    value: float
    context: int
    position: int
    document: int | None
    firing: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Feature:
    """All that is known of a feature.

    confidence: of the label, 0 to 1; density: share of tokens on which it fires; mean_act: where it
    fires; breadth: effective number of its own words; company: how many of them fire within one
    example; promotes, suppresses: (token text, logit).
    """

    id: int
    label: str
    confidence: float
    density: float
    mean_act: float
    max_act: float
    n_fired: int
    breadth: float
    company: float
    tokens: tuple[TokenStat, ...] = ()
    words: tuple[WordStat, ...] = ()
    promotes: tuple[tuple[str, float], ...] = ()
    suppresses: tuple[tuple[str, float], ...] = ()
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A feature and its searchable text: field of `FIELDS` -> text."""

    feature: Feature
    texts: Mapping[str, str]


def write(path: Path, entries: Iterable[Entry], meta: Mapping[str, Any]) -> None:
    """Write an index aside and rename it to `path`.

    Args:
        meta: anything that JSON can hold; what made the index.

    Raises:
        IndexingError: the disk is full, or the folder can't be written.
    """
    with written_aside(path) as aside:
        aside.unlink(missing_ok=True)
        try:
            connection = sqlite3.connect(aside)
            try:
                _write(connection, entries, meta)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise IndexingError(
                f"cannot write the index {path}: {error}; free some space or choose a run folder "
                "that you can write to"
            ) from error


def _write(
    connection: sqlite3.Connection, entries: Iterable[Entry], meta: Mapping[str, Any]
) -> None:
    # No journal: the file has another name until it is whole.
    connection.executescript(
        f"""
        PRAGMA page_size = {_PAGE}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
        PRAGMA application_id = {_APPLICATION};
        CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE features (
            id INTEGER PRIMARY KEY, label TEXT NOT NULL, confidence REAL NOT NULL,
            density REAL NOT NULL, mean_act REAL NOT NULL, max_act REAL NOT NULL,
            n_fired INTEGER NOT NULL, breadth REAL NOT NULL, company REAL NOT NULL);
        CREATE TABLE evidence (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
        CREATE VIRTUAL TABLE words USING fts5(text, tokenize = '{_TOKENIZER}');
        CREATE TABLE fires (
            word INTEGER NOT NULL, feature INTEGER NOT NULL, share REAL NOT NULL,
            lift REAL NOT NULL, recall REAL NOT NULL, PRIMARY KEY (word, feature)) WITHOUT ROWID;
        CREATE VIRTUAL TABLE texts USING fts5(
            {", ".join(FIELDS)}, content = '', tokenize = '{_TOKENIZER}');
        """
    )
    words: dict[str, int] = {}
    n_features = n_fired = 0
    for entry in entries:
        feature = entry.feature
        _write_feature(connection, feature, words)
        fields = [_storable(entry.texts.get(field, "")) for field in FIELDS]
        connection.execute(
            f"INSERT INTO texts (rowid, {', '.join(FIELDS)}) VALUES (?, ?, ?, ?, ?, ?)",
            (feature.id, *fields),
        )
        n_features += 1
        n_fired += feature.n_fired > 0
    connection.executemany(
        "INSERT INTO words (rowid, text) VALUES (?, ?)", ((i, word) for word, i in words.items())
    )
    everything = {**meta, "n_features": n_features, "n_alive": n_fired}
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)", ((k, json.dumps(v)) for k, v in everything.items())
    )
    connection.execute("INSERT INTO texts (texts) VALUES ('optimize')")
    # The version comes last: a file without it is not whole.
    connection.execute(f"PRAGMA user_version = {SCHEMA}")
    connection.commit()


def _write_feature(connection: sqlite3.Connection, f: Feature, words: dict[str, int]) -> None:
    connection.execute(
        "INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            f.id,
            _storable(f.label),
            f.confidence,
            f.density,
            f.mean_act,
            f.max_act,
            f.n_fired,
            f.breadth,
            f.company,
        ),
    )
    data = {
        "tokens": [list(vars(token).values()) for token in f.tokens],
        "words": [list(vars(word).values()) for word in f.words],
        "promotes": f.promotes,
        "suppresses": f.suppresses,
        "examples": [list(vars(example).values()) for example in f.examples],
    }
    packed = zlib.compress(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"), 6)
    connection.execute("INSERT INTO evidence VALUES (?, ?)", (f.id, packed))
    by_word = {
        words.setdefault(_storable(word.text.casefold()), len(words) + 1): word for word in f.words
    }
    connection.executemany(
        "INSERT INTO fires VALUES (?, ?, ?, ?, ?)",
        ((i, f.id, w.share, w.lift, w.recall(f.density)) for i, w in by_word.items()),
    )


def _storable(text: str) -> str:
    """Without what SQLite can't hold as text: lone surrogates read '?'."""
    return text.encode("utf-8", "replace").decode()


def unpacked(row: tuple[Any, ...], data: bytes | None) -> Feature:
    """A `Feature` from its row in `features` and its blob in `evidence` (None: without)."""
    if data is None:
        return Feature(*row)
    parts = json.loads(zlib.decompress(data))
    return replace(
        Feature(*row),
        tokens=tuple(TokenStat(*token) for token in parts["tokens"]),
        words=tuple(WordStat(*word) for word in parts["words"]),
        promotes=tuple((text, logit) for text, logit in parts["promotes"]),
        suppresses=tuple((text, logit) for text, logit in parts["suppresses"]),
        examples=tuple(
            Example(value, context, position, document, firing, tuple(t), tuple(p), tuple(a))
            for value, context, position, document, firing, t, p, a in parts["examples"]
        ),
    )


def read_meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """What made an index."""
    return {key: json.loads(value) for key, value in connection.execute("SELECT * FROM meta")}


def connect(path: Path) -> sqlite3.Connection:
    """Open an index for reading only.

    Raises:
        IndexingError: it is missing, truncated, no index, or of another version.
    """
    again = "make it with `saesteer index`"
    if not path.is_file():
        raise IndexingError(f"there is no feature index {path}; {again}")
    try:
        with path.open("rb") as file:
            header = file.read(100)
        if not header.startswith(b"SQLite format 3\0"):
            raise IndexingError(f"{path} is no feature index; {again}")
        page = int.from_bytes(header[16:18], "big")
        whole = (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big")
        if path.stat().st_size < whole:
            raise IndexingError(
                f"{path} is cut off: {path.stat().st_size} bytes of {whole}; {again} again"
            )
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise IndexingError(f"{path} can't be read ({error}); {again}") from error
    if application != _APPLICATION or version != SCHEMA:
        connection.close()
        what = (
            f"has version {version}, expected {SCHEMA}"
            if application == _APPLICATION
            else "is no feature index but another SQLite file"
        )
        raise IndexingError(f"{path} {what}; {again}")
    return connection
