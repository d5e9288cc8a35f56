"""Words that stand in many features, as arrays: what FTS5 is slow for (see `fts`).

    frequent  term, df, counts: zlib of uint8 or uint16 [size], how often the stem stands in each
              feature's text, weighted by field, in units of .5
    lengths   one row: number of features, zlib of int32 [size], words of each one's text

From these BM25 is worked out as FTS5 does it (sqlite.org/fts5.html, "The bm25() function"):

    sum over phrases of idf · f (k1 + 1) / (f + k1 (1 - b + b · length / mean length))
    idf = ln((n - df + .5) / (df + .5)), at least 1e-6;  k1 = 1.2, b = .75

with f the weighted count. `size` is the highest feature number + 1.
"""

import math
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from saesteer.features.query import AllOf, AnyOf, Node, Phrase, Without
from saesteer.features.rank import FIELD_WEIGHTS
from saesteer.features.records import FIELDS

_K1, _B = 1.2, 0.75
_UNIT = 0.5
# A word in more features than both is frequent: under some thousands FTS5 takes milliseconds.
_LEAST, _SHARE = 4_096, 1 / 32

# Numbers of features, ascending, and the score of each.
Found = tuple[NDArray[np.int64], NDArray[np.float32]]


def lay_frequent(connection: sqlite3.Connection) -> None:
    """Make `frequent` and `lengths` from `texts` and `terms`; commits nothing.

    Warns:
        UserWarning: SQLite keeps the lengths in a form not known here; FTS5 does all the work then.
    """
    connection.execute(
        "CREATE TABLE frequent (term TEXT PRIMARY KEY, df INTEGER NOT NULL, counts BLOB NOT NULL)"
    )
    connection.execute("CREATE TABLE lengths (n INTEGER NOT NULL, data BLOB NOT NULL)")
    n = connection.execute("SELECT count(*) FROM texts_docsize").fetchone()[0]
    common = connection.execute(
        "SELECT term, df FROM terms WHERE df > ? ORDER BY term", (max(_LEAST, n * _SHARE),)
    ).fetchall()
    if not common:
        return
    try:
        lengths = _lengths(connection)
    except ValueError as error:
        warnings.warn(
            f"SQLite {sqlite3.sqlite_version} keeps the lengths of texts in a form that is not "
            f"known ({error}): searching for common words will be slow",
            stacklevel=2,
        )
        return
    data = zlib.compress(lengths.astype("<i4").tobytes(), 1)
    connection.execute("INSERT INTO lengths VALUES (?, ?)", (n, data))
    connection.execute("CREATE VIRTUAL TABLE temp.stands USING fts5vocab(main, texts, instance)")
    weights = " ".join(f"WHEN '{name}' THEN {_units(name)}" for name in FIELDS)
    for term, df in common:
        rows = connection.execute(
            f"SELECT doc, sum(CASE col {weights} END) FROM temp.stands WHERE term = ? GROUP BY doc",
            (term,),
        )
        flat = np.fromiter((value for row in rows for value in row), np.int64)
        counts = np.zeros(len(lengths), np.int64)
        counts[flat[0::2]] = flat[1::2]
        kind = "u1" if counts.max() < 2**8 else "<u2"
        packed = zlib.compress(np.minimum(counts, 2**16 - 1).astype(kind).tobytes(), 1)
        connection.execute("INSERT INTO frequent VALUES (?, ?, ?)", (term, df, packed))
    connection.execute("DROP TABLE temp.stands")


def _units(field: str) -> int:
    units = FIELD_WEIGHTS[field] / _UNIT
    if units != int(units):
        raise ValueError(f"the weight of {field!r} is no multiple of {_UNIT}")
    return int(units)


def _lengths(connection: sqlite3.Connection) -> NDArray[np.int64]:
    """Words of each text, from FTS5's own table: a varint (7 bits a byte, the high bit set on all
    but the last) for each column.

    Raises:
        ValueError: it holds something else.
    """
    rows = connection.execute("SELECT id, sz FROM texts_docsize ORDER BY id").fetchall()
    data = np.frombuffer(b"".join(sizes for _, sizes in rows), np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if len(ends) != len(rows) * len(FIELDS) or len(data) != ends[-1] + 1:
        raise ValueError(f"{len(ends)} numbers for {len(rows)} texts of {len(FIELDS)} fields")
    starts = np.concatenate([[0], ends[:-1] + 1])
    values = np.zeros(len(ends), np.int64)
    for k in range(int((ends - starts).max()) + 1):
        inside = starts + k <= ends
        values[inside] = values[inside] << 7 | data[starts[inside] + k] & 0x7F
    lengths = np.zeros(rows[-1][0] + 1, np.int64)
    lengths[[i for i, _ in rows]] = values.reshape(len(rows), len(FIELDS)).sum(axis=1)
    return lengths


class Frequent:
    """The frequent words of an index, and how they join what FTS5 finds for the others."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self._n, data = connection.execute("SELECT n, data FROM lengths").fetchone()
        lengths = np.frombuffer(zlib.decompress(data), "<i4").astype(np.float32)
        mean = float(lengths.sum(dtype=np.float64)) / self._n
        norm = _K1 * (1 - _B) + lengths * np.float32(_K1 * _B / mean)
        self._norm: NDArray[np.float32] = norm.astype(np.float32)

    @property
    def size(self) -> int:
        return len(self._norm)

    def find(self, node: Node, stems: Mapping[Phrase, str], rows: Callable[[Node], Found]) -> Found:
        """All features that match an expression, with their BM25.

        Args:
            stems: those of its phrases that are a frequent word -> its stem.
            rows: what FTS5 finds for an expression.
        """
        if not _has(node, stems):
            return rows(node)
        match node:
            case AllOf(parts):
                return self._all(parts, stems, rows)
            case AnyOf(parts):
                rare = tuple(part for part in parts if not _has(part, stems))
                others = [part for part in parts if _has(part, stems)]
                total, hit = np.zeros(self.size, np.float32), np.zeros(self.size, bool)
                for part in [*([AnyOf(rare)] if rare else []), *others]:
                    ids, scores = self.find(part, stems, rows)
                    total[ids] += scores
                    hit[ids] = True
                ids = np.flatnonzero(hit)
                return ids, total[ids]
            case Without(keep, drop):
                ids, scores = self.find(keep, stems, rows)
                dropped = np.zeros(self.size, bool)
                for part in drop:
                    dropped[self.find(part, stems, rows)[0]] = True
                left = ~dropped[ids]
                return ids[left], scores[left]
            case Phrase():
                counts, idf = self._word(stems[node])
                ids = np.flatnonzero(counts)
                return ids, self._bm25(counts[ids], idf, ids)

    def _all(
        self, parts: tuple[Node, ...], stems: Mapping[Phrase, str], rows: Callable[[Node], Found]
    ) -> Found:
        """AND: what FTS5 finds and other parts first, so that the arrays are read only there."""
        words = [
            self._word(stems[part]) for part in parts if isinstance(part, Phrase) and part in stems
        ]
        rare = tuple(part for part in parts if not _has(part, stems))
        nested = [p for p in parts if not isinstance(p, Phrase) and _has(p, stems)]
        found: Found | None = rows(AllOf(rare)) if rare else None
        for part in nested:
            more = self.find(part, stems, rows)
            if found is None:
                found = more
            else:
                ids, mine, theirs = np.intersect1d(
                    found[0], more[0], assume_unique=True, return_indices=True
                )
                found = ids, found[1][mine] + more[1][theirs]
        if found is None:
            everywhere = words[0][0] > 0
            for counts, _ in words[1:]:
                everywhere &= counts > 0
            ids = np.flatnonzero(everywhere)
            found = ids, np.zeros(len(ids), np.float32)
        ids, scores = found
        for counts, _ in words:
            inside = counts[ids] > 0
            ids, scores = ids[inside], scores[inside]
        for counts, idf in words:
            scores = scores + self._bm25(counts[ids], idf, ids)
        return ids, scores

    def _word(self, stem: str) -> tuple[NDArray[np.unsignedinteger], float]:
        """How often a word stands in each feature [size], in units of .5, and its idf."""
        df, packed = self._connection.execute(
            "SELECT df, counts FROM frequent WHERE term = ?", (stem,)
        ).fetchone()
        data = zlib.decompress(packed)
        counts = np.frombuffer(data, "u1" if len(data) == self.size else "<u2")
        return counts, max(1e-6, math.log((self._n - df + 0.5) / (df + 0.5)))

    def _bm25(
        self, counts: NDArray[np.unsignedinteger], idf: float, ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        f = counts.astype(np.float32) * np.float32(_UNIT)
        return np.float32(idf * (_K1 + 1)) * f / (f + self._norm[ids])


def largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Places of the k largest, largest first; of equal ones the first."""
    if len(scores) > k:
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > least)
        level = np.flatnonzero(scores == least)[: k - len(above)]
        places = np.concatenate([above, level])
    else:
        places = np.arange(len(scores))
    return places[np.lexsort((places, -scores[places]))]


def _has(node: Node, stems: Mapping[Phrase, str]) -> bool:
    """Whether a frequent word stands in an expression."""
    match node:
        case Phrase():
            return node in stems
        case AllOf(parts) | AnyOf(parts):
            return any(_has(part, stems) for part in parts)
        case Without(keep, drop):
            return any(_has(part, stems) for part in (keep, *drop))
