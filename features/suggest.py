"""What a misspelled word of a query may have been meant to be."""

import re
import sqlite3
from collections.abc import Iterator, Sequence

from saesteer.features.query import Query

# Whole queries suggested, and features that a word's rank among equally near ones is told by.
_MOST = 3
# A word of up to this length may differ in one place, a longer one in two.
_SHORT = 4


def suggestions(connection: sqlite3.Connection, text: str, query: Query) -> list[str]:
    """A query with the words that no feature knows replaced by near ones on which features fire.

    Args:
        text: the query as it was written; query: as it was read.

    Returns:
        At most three, best first; none where every word is known or none is near.
    """
    unknown = [
        phrase.words[0]
        for phrase in query.words
        if not phrase.prefix and not _known(connection, phrase.words[0])
    ]
    near = {word: _near(connection, word) for word in unknown}
    found = []
    for place in range(_MOST):
        if any(len(words) > place for words in near.values()):
            replaced = text
            for word, words in near.items():
                if words:
                    other = words[min(place, len(words) - 1)]
                    pattern = rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
                    replaced = re.sub(pattern, other, replaced, flags=re.IGNORECASE)
            found.append(replaced)
    return [one for one in dict.fromkeys(found) if one != text]


def _known(connection: sqlite3.Connection, word: str) -> bool:
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE {table} MATCH ? LIMIT 1", (f'"{word}"',))
        .fetchone()
        for table in ("texts", "noted")
    )  # fmt: skip


def _near(connection: sqlite3.Connection, word: str) -> list[str]:
    """The nearest words on which features fire, those of the most features first."""
    most = 1 if len(word) <= _SHORT else 2
    letters = set(word)
    rows = connection.execute(
        "SELECT rowid, text FROM words WHERE length(text) BETWEEN ? AND ?",
        (len(word) - most, len(word) + most),
    ).fetchall()
    near = []
    for i, other in rows:
        # Each change takes away one letter and brings another at the most.
        if len(letters.symmetric_difference(other)) <= 2 * most:
            apart = distance(word, other, most)
            if apart <= most:
                near.append((apart, i, other))
    near.sort()
    ranked = sorted(
        (apart, -_features(connection, i), other) for apart, i, other in near[: 20 * _MOST]
    )
    return [other for _, _, other in ranked[:_MOST]]


def _features(connection: sqlite3.Connection, word: int) -> int:
    return connection.execute("SELECT count(*) FROM fires WHERE word = ?", (word,)).fetchone()[0]


def distance(a: str, b: str, most: int) -> int:
    """Letters to insert, delete, replace or swap with their neighbour to make one word of another
    (optimal string alignment); `most` + 1 where it takes more than `most`."""
    rows: list[Sequence[int]] = []
    for row in _rows(a, b):
        # Later rows are built on the last two.
        if min(row) > most and rows and min(rows[-1]) > most:
            return most + 1
        rows.append(row)
    return min(rows[-1][-1], most + 1)


def _rows(a: str, b: str) -> Iterator[Sequence[int]]:
    before: list[int] = []
    last = list(range(len(b) + 1))
    yield last
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            best = min(last[j] + 1, row[-1] + 1, last[j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
        yield row
