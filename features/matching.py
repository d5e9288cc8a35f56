"""From a query to features and their scores: what fires on its words joined with what its text
says (see `rank`)."""

import heapq
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from saesteer.features.engine import TextEngine
from saesteer.features.fts import match
from saesteer.features.query import AnyOf, Node, Phrase, Query
from saesteer.features.rank import MOST_RAISED, TEXT_WEIGHT, aboutness, rank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Candidates taken from each kind of evidence before ranking, at the least.
_CANDIDATES = 200
# With fewer hits than asked for, words that begin with the query's (of this length) count too.
_PREFIX = 3
# Words that one word of a query can stand for: its forms, or those that begin with it.
_FORMS = 64
# What a user writes has other fields than the features' own text.
_NOTED = {"label": ("name",)}


# What a feature does on one word of a query: share, lift, recall (see `rank.aboutness`). A plain
# tuple: a query makes thousands.
_Fired = tuple[float, float, float]


@dataclass(frozen=True)
class Match:
    """A feature that a query found, and what of the query was found where."""

    feature: int
    score: float
    why: str


def matches(
    connection: sqlite3.Connection,
    engine: TextEngine,
    query: Query,
    limit: int,
    *,
    allowed: "NDArray[np.bool_] | None" = None,
    every: bool = False,
) -> list[Match]:
    """The features that answer a query, best first.

    Plain words: any may match, and where fewer than `limit` features do, words that only begin with
    one fill up, after all others. An expression decides what is found; the order is the same.

    Args:
        limit: the best so many are among those returned.
        every: return all candidates, not only those that could be among the best.
    """
    search = _Search(connection, engine, allowed, None if every else limit)
    if query.expression is not None:
        found = search.candidates(query.words, query.expression, strict=True)
        return found.best(None if every else limit)
    if not query.words:
        return []
    found = search.candidates(query.words, AnyOf(query.words), strict=False)
    best = found.best(None if every else limit)
    longer = tuple(Phrase(p.words, prefix=True) for p in query.words if len(p.words[0]) >= _PREFIX)
    if len(best) < limit and longer:
        more = search.candidates(longer, AnyOf(longer), strict=False).best(None)
        floor = min((m.score for m in best), default=1.0)
        highest = max((m.score for m in more), default=1.0) or 1.0
        best += [
            replace(m, score=floor * m.score / (highest * 1.001))
            for m in more
            if m.feature not in found.scores
        ]
    return best


@dataclass(frozen=True)
class _Candidates:
    """Candidates and their scores; for each word of the query, its forms in the text, commonest
    first, and which fire on them; what a user, and a model, wrote that matches."""

    scores: dict[int, float]
    forms: list[list[str]]
    fired: list[dict[int, _Fired]]
    notes: dict[int, float]
    written: dict[int, float]

    def best(self, limit: int | None) -> list[Match]:
        order = sorted(self.scores, key=lambda i: (-self.scores[i], i))[:limit]
        return [Match(i, self.scores[i], self._why(i)) for i in order]

    def _why(self, feature: int) -> str:
        if feature in self.notes:
            return "in what you wrote about it"
        fired = [own[feature] for own in self.fired if feature in own]
        if not fired:
            judged = feature in self.written
            return "in its written label" if judged else "in its examples or promoted tokens"
        share, recall = sum(one[0] for one in fired), max(one[2] for one in fired)
        forms = [own for own, on in zip(self.forms, self.fired, strict=True) if feature in on]
        # The commonest form of each word, then the others.
        words = [word for place in zip_longest(*forms) for word in place if word]
        named = ", ".join(f"'{word}'" for word in words[:2])
        return f"fires on {recall:.0%} of {named} ({share:.0%} of its activation)"


@dataclass(frozen=True)
class _Search:
    """keep: candidates that can't be among the best so many are dropped; None: none is."""

    connection: sqlite3.Connection
    engine: TextEngine
    allowed: "NDArray[np.bool_] | None"
    keep: int | None

    def candidates(self, words: Sequence[Phrase], expression: Node, *, strict: bool) -> _Candidates:
        """The candidates for an expression; strict: only what matches it."""
        found = [self._fired(word) for word in words]
        forms, fired = [names for names, _ in found], [own for _, own in found]
        firing = dict.fromkeys(i for own in fired for i in own)
        texts = dict(
            self.engine.scored(
                expression, self._most, allowed=self.allowed, also=firing if strict else ()
            )
        )
        notes, written = self._noted(expression)
        ids = list(dict.fromkeys([*notes, *written, *texts, *([] if strict else firing)]))
        best = max(texts.values(), default=0.0) or 1.0
        about = dict.fromkeys(ids, 0.0)
        for own in fired:
            for i in own.keys() & about.keys():
                share, lift, recall = own[i]
                about[i] += aboutness(share, lift, recall) / len(words)

        if self.keep is not None and len(ids) > self.keep:
            # Breadth and company are read only of what they could raise among the best: a score is
            # never below `about`.
            bar = heapq.nlargest(self.keep, about.values())[-1]
            ids = [
                i
                for i in ids
                if MOST_RAISED * about[i] + TEXT_WEIGHT * texts.get(i, 0.0) / best >= bar
                or i in notes
                or i in written
            ]
        scores = {
            i: rank(
                texts.get(i, 0.0) / best,
                about[i],
                breadth,
                company,
                note=notes.get(i, 0.0),
                written=written.get(i, 0.0),
            )
            for i, breadth, company in self._spread(ids)
        }
        return _Candidates(scores, forms, fired, notes, written)

    @property
    def _most(self) -> int:
        """Candidates taken of each kind: as many as are asked for, at the least."""
        return max(_CANDIDATES, self.keep or 0)

    def _fired(self, word: Phrase) -> tuple[list[str], dict[int, _Fired]]:
        """The forms of a word, or words that begin so, and the features that fire on them most."""
        rows = self.connection.execute(
            "SELECT f.feature, f.share, f.lift, f.recall, f.base, w.text FROM (SELECT rowid, text "
            "FROM words WHERE words MATCH ? ORDER BY rowid LIMIT ?) AS w "
            "JOIN fires AS f ON f.word = w.rowid ORDER BY f.recall * f.share DESC LIMIT ?",
            (match(word, {}), _FORMS, 2 * self._most),
        ).fetchall()
        # Of an index that doesn't say how frequent words are, all forms count alike.
        bases = {text: base or 1.0 for *_, base, text in rows}
        total = sum(bases.values())
        found: dict[int, _Fired] = {}
        for feature, share, lift, recall, _, text in rows:
            if self.allowed is None or self.allowed[feature]:
                # The share of all occurrences, of whatever form, on which it fires.
                part = bases[text] / total
                before = found.get(feature, (0.0, 0.0, 0.0))
                found[feature] = (
                    before[0] + share, before[1] + lift * part, before[2] + recall * part
                )  # fmt: skip
        return sorted(bases, key=lambda text: (-bases[text], text)), found

    def _noted(self, expression: Node) -> tuple[dict[int, float], dict[int, float]]:
        """BM25 of what a user, and of what a model wrote, against the best one's."""
        asked = match(expression, _NOTED)
        # Where the user gave no name, a judge's label stands for it (see `notes.lay`).
        rows = self.connection.execute(
            "SELECT rowid, -bm25(noted) AS score, rowid IN (SELECT feature FROM notes WHERE name "
            "IS NOT NULL) OR rowid IN (SELECT rowid FROM noted WHERE noted MATCH ?) "
            "FROM noted WHERE noted MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (f"{{tags text}} : ({asked})", asked, self._most),
        ).fetchall()
        notes: dict[int, float] = {}
        written: dict[int, float] = {}
        for feature, score, by_user in rows:
            if self.allowed is None or self.allowed[feature]:
                (notes if by_user else written)[feature] = score / rows[0][1]
        return notes, written

    def _spread(self, ids: Sequence[int]) -> Iterator[tuple[int, float, float]]:
        """Features with their breadth and company."""
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            marks = ", ".join("?" * len(part))
            yield from self.connection.execute(
                f"SELECT id, breadth, company FROM features WHERE id IN ({marks})", part
            ).fetchall()
