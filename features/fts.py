"""The features' text in SQLite's FTS5: building it, and searching it with BM25.

    texts     the text of each feature, by field (FTS5; the text itself isn't kept)
    terms     each stem and in how many features it stands
    frequent  of stems in many features, how often they stand in each (see `frequent`)
    lengths   the words of each feature's text (one row)

FTS5 must visit every feature that matches to score it: with words that stand in a third of a
million features that takes a second. So `frequent` holds those words' figures as arrays; FTS5 is
asked for the other words, phrases, beginnings and fields, and the two are joined. The scores are
those of FTS5's own bm25() to the rounding of a float.
"""

import sqlite3
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from saesteer.features.engine import Scored
from saesteer.features.query import AllOf, AnyOf, Node, Phrase, Without, phrases
from saesteer.features.rank import FIELD_WEIGHTS
from saesteer.features.records import FIELDS, QUERY_FIELDS
from saesteer.features.schema import TOKENIZER, storable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from saesteer.features.frequent import Frequent

_WEIGHTS = ", ".join(str(FIELD_WEIGHTS[field]) for field in FIELDS)


def build(connection: sqlite3.Connection, pairs: Iterable[tuple[int, Mapping[str, str]]]) -> None:
    """Make and fill all tables of the text search; commits nothing.

    Args:
        pairs: (feature, its text by field of `FIELDS`), numbered 0, 1, …; read lazily and once.
    """
    connection.execute(
        f"CREATE VIRTUAL TABLE texts USING fts5("
        f"{', '.join(FIELDS)}, content = '', tokenize = '{TOKENIZER}')"
    )
    connection.executemany(
        f"INSERT INTO texts (rowid, {', '.join(FIELDS)}) VALUES (?{', ?' * len(FIELDS)})",
        ((i, *(storable(texts.get(field, "")) for field in FIELDS)) for i, texts in pairs),
    )
    # One segment: a search is a few times slower over several.
    connection.execute("INSERT INTO texts (texts) VALUES ('optimize')")
    finish(connection)


def finish(connection: sqlite3.Connection) -> None:
    """Make what is derived of `texts`: `terms`, `frequent` and `lengths`; commits nothing."""
    connection.execute("CREATE TABLE terms (term TEXT PRIMARY KEY, df INTEGER) WITHOUT ROWID")
    connection.execute(
        "CREATE VIRTUAL TABLE temp.all_terms USING fts5vocab('main', 'texts', 'row')"
    )
    connection.execute("INSERT INTO terms SELECT term, doc FROM temp.all_terms")
    connection.execute("DROP TABLE temp.all_terms")
    from saesteer.features.frequent import lay_frequent

    lay_frequent(connection)


class Stems:
    """The stems that FTS5 makes of texts, by an empty index of its own."""

    def __init__(self) -> None:
        self._scratch = sqlite3.connect(":memory:")
        weakref.finalize(self, self._scratch.close)
        self._scratch.executescript(
            f"CREATE VIRTUAL TABLE t USING fts5(text, tokenize = '{TOKENIZER}');"
            "CREATE VIRTUAL TABLE v USING fts5vocab(t, instance)"
        )

    def of(self, texts: Sequence[str]) -> list[list[str]]:
        """Of each text its stems, in order."""
        found: list[list[str]] = [[] for _ in texts]
        self._scratch.executemany("INSERT INTO t (rowid, text) VALUES (?, ?)", enumerate(texts))
        for i, stem in self._scratch.execute("SELECT doc, term FROM v ORDER BY doc, offset"):
            found[i].append(stem)
        self._scratch.rollback()
        return found


def match(node: Node, columns: Mapping[str, tuple[str, ...]]) -> str:
    """An expression in FTS5's language, every word quoted, so that nothing in it is syntax.

    Args:
        columns: field of a query -> columns of the table; one that isn't there matches nothing.
    """
    match node:
        case Phrase(words, prefix, field):
            quoted = f'"{" ".join(words)}"{" *" if prefix else ""}'
            if field is None:
                return quoted
            return f"{{{' '.join(columns[field])}}} : {quoted}" if field in columns else '""'
        case AllOf(parts):
            return " AND ".join(f"({match(part, columns)})" for part in parts)
        case AnyOf(parts):
            return " OR ".join(f"({match(part, columns)})" for part in parts)
        case Without(keep, drop):
            return f"({match(keep, columns)}) NOT ({match(AnyOf(drop), columns)})"


class Fts5:
    """Search of the tables of this module; a `TextEngine`."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self._frequent: Frequent | None = None
        some = connection.execute("SELECT 1 FROM frequent LIMIT 1").fetchone()
        self._stems = Stems() if some else None

    def scored(
        self,
        expression: Node,
        limit: int,
        *,
        allowed: "NDArray[np.bool_] | None" = None,
        also: Collection[int] = (),
    ) -> Scored:
        """See `TextEngine`."""
        frequent = self._frequent_stems(expression)
        if not frequent and allowed is None:
            rows = self._rows(expression, "score DESC, rowid" + ("" if also else f" LIMIT {limit}"))
            wanted = set(also)
            return [row for i, row in enumerate(rows) if i < limit or row[0] in wanted]
        import numpy as np

        from saesteer.features.frequent import Frequent, largest

        if not frequent:
            ids, scores = self._arrays(expression)
        else:
            if self._frequent is None:
                self._frequent = Frequent(self._connection)
            ids, scores = self._frequent.find(expression, frequent, self._arrays)
        if allowed is not None:
            inside = allowed[ids]
            ids, scores = ids[inside], scores[inside]
        best = largest(scores, limit)
        chosen = best
        if also and len(ids):
            asked = np.zeros(1 + max(int(ids[-1]), *also), bool)
            asked[list(also)] = True
            rest = asked[ids]
            rest[best] = False
            chosen = np.concatenate([best, np.flatnonzero(rest)])
        return list(zip(ids[chosen].tolist(), scores[chosen].tolist(), strict=True))

    def _rows(self, expression: Node, order: str) -> Scored:
        """What FTS5 itself finds."""
        return self._connection.execute(
            f"SELECT rowid, -bm25(texts, {_WEIGHTS}) AS score FROM texts WHERE texts MATCH ? "
            f"ORDER BY {order}",
            (match(expression, QUERY_FIELDS),),
        ).fetchall()

    def _arrays(self, expression: Node) -> "tuple[NDArray[np.int64], NDArray[np.float32]]":
        """What FTS5 itself finds, by number."""
        import numpy as np

        rows = self._rows(expression, "rowid")
        ids = np.fromiter((i for i, _ in rows), np.int64, len(rows))
        return ids, np.fromiter((score for _, score in rows), np.float32, len(rows))

    def _frequent_stems(self, expression: Node) -> dict[Phrase, str]:
        """Those of an expression's phrases that are one frequent word, and its stem."""
        if self._stems is None:
            return {}
        single = [p for p in set(phrases(expression)) if not p.field and not p.prefix]
        found = dict(zip(single, self._stems.of([" ".join(p.words) for p in single]), strict=True))
        alone = {phrase: own[0] for phrase, own in found.items() if len(own) == 1}
        marks = ", ".join("?" * len(alone))
        known = self._connection.execute(
            f"SELECT term FROM frequent WHERE term IN ({marks})", list(alone.values())
        ).fetchall()
        return {phrase: stem for phrase, stem in alone.items() if (stem,) in known}
