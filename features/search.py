"""Keyword search over a feature index, and what a run asks of one.

Nothing here imports torch, transformers or numpy.
"""

import math
import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from saesteer.errors import FeatureError, IndexingError
from saesteer.features import store
from saesteer.features.rank import FIELD_WEIGHTS, Firing, rank
from saesteer.features.store import Example, Feature

# Candidates taken from each kind of evidence before ranking.
_CANDIDATES = 200
# What is read of a query: nobody means the 17th word, or a word of 65 letters.
_TERMS, _LETTERS = 16, 64
# With fewer hits than asked for, words that begin with the query's (of this length) count too.
_PREFIX = 3
_STRENGTH = re.compile(
    r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)\s*(x?)\s*", re.IGNORECASE
)
_COLUMNS = "id, label, confidence, density, mean_act, max_act, n_fired, breadth, company"


@dataclass(frozen=True)
class Hit:
    """A feature that a search found.

    score: higher is better, comparable within one search; top_tokens: what it fires on most;
    example: its strongest context as text, the firing token between « and »; why: what of the
    query was found where.
    """

    id: int
    label: str
    score: float
    density: float
    max_act: float
    top_tokens: tuple[str, ...]
    example: str
    why: str


@dataclass(frozen=True)
class _Term:
    """A word of the query, and its FTS5 expression: quoted, so that nothing in it is syntax."""

    text: str
    match: str


class Index:
    """An open feature index; a context manager. Read only."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._connection = connection
        with self._reading():
            self.meta: dict[str, Any] = store.read_meta(connection)
        self.n_features: int = self.meta["n_features"]

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Open an index.

        Raises:
            IndexingError: it is missing, truncated, foreign or of another version.
        """
        path = Path(path)
        connection = store.connect(path)
        try:
            return cls(path, connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def search(self, query: str, limit: int = 10) -> list[Hit]:
        """Features for plain words, best first; an empty list where nothing matches.

        Words are stemmed (waves finds wave) and any of them may match; a feature that has more of
        them comes first. Words that only begin with a query word fill up a short list. Nothing in
        a query is syntax.

        Raises:
            IndexingError: the index is damaged.
        """
        terms = _terms(query)
        if not terms or limit < 1:
            return []
        with self._reading():
            scores = self._scores(terms)
            if len(scores) < limit:
                long = [term for term in terms if len(term.text) >= _PREFIX]
                longer = [_Term(term.text, f"{term.match}*") for term in long]
                # Whole words first, whatever a beginning scores.
                floor = min((score for score, *_ in scores.values()), default=1.0)
                more = self._scores(longer) if longer else {}
                best = max((score for score, *_ in more.values()), default=1.0) or 1.0
                for feature, (score, *rest) in more.items():
                    scores.setdefault(feature, (floor * score / (best * 1.001), *rest))  # type: ignore[arg-type]
            ordered = sorted(scores, key=lambda i: (-scores[i][0], i))[:limit]
            return [self._hit(i, *scores[i]) for i in ordered]

    def feature(self, feature: int) -> Feature:
        """The full record of a feature.

        Raises:
            FeatureError: there is none of that number.
        """
        return self._feature(feature, evidence=True)

    def max_act(self, feature: int) -> float:
        """The highest activation of a feature over the indexed text, 0 where it never fired.

        Raises:
            FeatureError: there is none of that number.
        """
        return self._feature(feature, evidence=False).max_act

    def strength(self, feature: int, value: str | float) -> float:
        """The raw activation meant by "8x" (times max_act) or a bare number.

        Raises:
            FeatureError: no such feature, a malformed strength, or "8x" of one that never fired.
        """
        return strength(value, self.max_act(feature), feature=feature)

    def _feature(self, feature: int, *, evidence: bool) -> Feature:
        whole = isinstance(feature, int) and not isinstance(feature, bool)
        row = data = None
        # SQLite's integers have 64 bits.
        if whole and abs(feature) < 2**63:
            with self._reading():
                row = self._connection.execute(
                    f"SELECT {_COLUMNS} FROM features WHERE id = ?", (feature,)
                ).fetchone()
                if row and evidence:
                    data = self._connection.execute(
                        "SELECT data FROM evidence WHERE id = ?", (feature,)
                    ).fetchone()[0]
        if row is None:
            raise FeatureError(
                f"there is no feature {feature!r}: this SAE has features 0 to "
                f"{self.n_features - 1}; find one with `saesteer search`"
            )
        with self._reading():
            return store.unpacked(row, data)

    def _scores(self, terms: list[_Term]) -> dict[int, tuple[float, list[Firing], list[str]]]:
        """Score, firings and matching words of each candidate."""
        firings: dict[int, list[Firing]] = {}
        named: dict[int, list[str]] = {}
        for place, term in enumerate(terms):
            rows = self._connection.execute(
                "SELECT f.feature, f.share, f.lift, f.recall, w.text "
                "FROM words AS w JOIN fires AS f ON f.word = w.rowid WHERE words MATCH ? "
                "ORDER BY f.recall * f.share DESC LIMIT ?",
                (term.match, 4 * _CANDIDATES),
            ).fetchall()
            for feature, share, lift, recall, word in rows:
                own = firings.setdefault(feature, [Firing()] * len(terms))
                # Several forms of one word: their shares add up, the best lift and recall count.
                own[place] = Firing(
                    own[place].share + share,
                    max(own[place].lift, lift),
                    max(own[place].recall, recall),
                )
                if word not in named.setdefault(feature, []):
                    named[feature].append(word)
        texts = self._texts(terms)
        ids = list(dict.fromkeys([*firings, *texts]))
        spread = self._spread(ids)
        best = max(texts.values(), default=0.0) or 1.0
        return {
            i: (
                rank(
                    texts.get(i, 0.0) / best,
                    firings.get(i, [Firing()] * len(terms)),
                    *spread.get(i, (0.0, 0.0)),
                ),
                firings.get(i, []),
                named.get(i, []),
            )
            for i in ids
        }

    def _texts(self, terms: list[_Term]) -> dict[int, float]:
        """BM25 of the features whose text matches any of the terms best."""
        weights = ", ".join(str(FIELD_WEIGHTS[field]) for field in store.FIELDS)
        rows = self._connection.execute(
            f"SELECT rowid, -bm25(texts, {weights}) AS score FROM texts WHERE texts MATCH ? "
            "ORDER BY score DESC LIMIT ?",
            (" OR ".join(term.match for term in terms), _CANDIDATES),
        )
        return dict(rows)

    def _spread(self, ids: list[int]) -> dict[int, tuple[float, float]]:
        """Breadth and company of some features."""
        found: dict[int, tuple[float, float]] = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            marks = ", ".join("?" * len(part))
            rows = self._connection.execute(
                f"SELECT id, breadth, company FROM features WHERE id IN ({marks})", part
            )
            found |= {i: (breadth, company) for i, breadth, company in rows}
        return found

    def _hit(self, feature: int, score: float, firings: list[Firing], words: list[str]) -> Hit:
        found = self._feature(feature, evidence=True)
        tokens = dict.fromkeys(word.text for word in found.words)
        return Hit(
            id=feature,
            label=found.label,
            score=score,
            density=found.density,
            max_act=found.max_act,
            top_tokens=tuple(tokens)[:8],
            example=marked(found.examples[0]) if found.examples else "",
            why=_why(firings, words),
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError, zlib.error) as error:
            raise IndexingError(
                f"{self.path} is damaged ({error}); make it again with `saesteer index`"
            ) from error


def strength(value: str | float, max_act: float | None, *, feature: int | None = None) -> float:
    """The raw activation that a strength means: "8x" is 8 × max_act, a bare number itself.

    Args:
        value: "8x", "-2.5x", "12" or a number.
        max_act: of the feature; None where there is no index, 0 where it never fired.
        feature: its number, for messages.

    Raises:
        FeatureError: malformed, not finite, or "8x" without a max_act.
    """
    name = "this feature" if feature is None else f"feature {feature}"
    how = 'write "8x" for 8 times its highest activation, or a plain number for a raw activation'
    match = _STRENGTH.fullmatch(str(value))
    if match is None or isinstance(value, bool) or not math.isfinite(float(match[1])):
        raise FeatureError(f"{value!r} is no strength for {name}; {how}")
    if not match[2]:
        return float(match[1])
    if max_act is None:
        raise FeatureError(
            f"{value!r} needs the highest activation of {name}, which only an index knows; make "
            "one with `saesteer index`, or give a plain number"
        )
    if max_act <= 0:
        raise FeatureError(
            f"{name} never fired on the indexed text, so {value!r} means nothing; choose another "
            "feature, or give a plain number"
        )
    if not math.isfinite(float(match[1]) * max_act):
        raise FeatureError(f"{value!r} is too large a strength for {name}; {how}")
    return float(match[1]) * max_act


def marked(example: Example, opening: str = "«", closing: str = "»") -> str:
    """An example as text, the firing token between two marks (its leading space outside)."""
    text = ""
    for i, piece in enumerate(example.pieces):
        if i == example.firing:
            bare = piece.lstrip()
            piece = f"{piece[: len(piece) - len(bare)]}{opening}{bare}{closing}"
        text += piece
    return text.strip()


def _terms(query: str) -> list[_Term]:
    words = dict.fromkeys(re.findall(r"[^\W_]+", query[:20_000].casefold()))
    return [_Term(word, f'"{word[:_LETTERS]}"') for word in list(words)[:_TERMS]]


def _why(firings: list[Firing], words: list[str]) -> str:
    if not words:
        return "in its examples or promoted tokens"
    share = sum(firing.share for firing in firings)
    recall = max(firing.recall for firing in firings)
    named = ", ".join(f"'{word}'" for word in words[:3])
    return f"fires on {recall:.0%} of {named} ({share:.0%} of its activation)"
