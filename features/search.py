"""Keyword search over a feature index, and what a run asks of one.

Nothing here imports torch or transformers; numpy only where a query has a filter, a word that
stands in thousands of features, or asks for the order by effect.
"""

import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from saesteer.errors import FeatureError, IndexingError
from saesteer.features import store, tantivy_engine
from saesteer.features.database import begun, identity
from saesteer.features.engine import TextEngine
from saesteer.features.filters import allowed
from saesteer.features.fts import Fts5
from saesteer.features.hit import Hit, by_effect, hit, marked
from saesteer.features.matching import matches
from saesteer.features.migrate import connect
from saesteer.features.query import parse
from saesteer.features.records import Feature, Neighbour
from saesteer.features.strength import strength
from saesteer.features.suggest import suggestions

__all__ = ["Hit", "Index", "marked", "strength"]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Times that an index is opened again for one question.
_TRIES = 10


@dataclass
class _Opened:
    """One thread's connection to the file as it was when opened."""

    connection: sqlite3.Connection
    identity: tuple[int, int]
    meta: dict[str, Any]
    engine: TextEngine


class Index:
    """An open feature index; a context manager. Reads only, from any thread.

    Where the index is made again meanwhile, the next question is asked of the new one.
    """

    def __init__(self, path: Path):
        self.path = path
        self._local = threading.local()

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Open an index.

        Raises:
            IndexingError: it is missing, truncated, foreign or made by a newer saesteer.
        """
        index = cls(Path(path))
        with index._reading():
            return index

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with them."""
        opened: _Opened | None = self._local.__dict__.pop("opened", None)
        if opened is not None:
            opened.connection.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def meta(self) -> dict[str, Any]:
        """What made the index: see `store`."""
        with self._reading() as opened:
            return opened.meta

    @property
    def n_features(self) -> int:
        return int(self.meta["n_features"])

    def search(
        self, query: str, limit: int = 10, *, sort: Literal["match", "effect"] = "match"
    ) -> list[Hit]:
        """Features for a query in the language of `query`, best first; [] where nothing matches.

        Words are stemmed (waves finds wave). Of plain words any may match; a feature that has more
        of them comes first, and words that only begin with one fill up a short list. An expression
        decides what is found. Filters alone list features by number.

        Args:
            sort: "effect" orders by match · √max(0, own effect): a feature that mentions the words
                and causes nothing goes down. Not measured counts as 0; ties stay in match order.

        Raises:
            IndexingError: the index is damaged, or a filter has no number.
        """
        if sort not in ("match", "effect"):
            raise IndexingError(f'sort is "match" or "effect", not {sort!r}')
        asked = parse(query)
        if limit < 1:
            return []
        with self._reading() as opened:
            mask = allowed(asked.filters, opened.connection, self.column)
            effect = self.column("own_effect") if sort == "effect" else None
            if asked.words or asked.expression:
                found = matches(
                    opened.connection,
                    opened.engine,
                    asked,
                    limit,
                    allowed=mask,
                    every=effect is not None,
                )
                if effect is not None:
                    found.sort(key=lambda m: -by_effect(m.score, float(effect[m.feature])))
                return self.hits([(m.feature, m.score, m.why) for m in found[:limit]])
            if mask is None:
                return []
            ids = mask.nonzero()[0].tolist()
            if effect is not None:
                ids.sort(key=lambda i: -by_effect(1.0, float(effect[i])))
            return self.hits([(i, 0.0, "passes the filters") for i in ids[:limit]])

    def suggest(self, query: str) -> list[str]:
        """The query with misspelled words mended, at most three ways; [] where all are known."""
        with self._reading() as opened:
            return suggestions(opened.connection, query, parse(query))

    def hits(self, found: Sequence[tuple[int, float, str]]) -> list[Hit]:
        """(feature, score, why) of features found by other means, as hits, in their order."""
        brief = {f.id: f for f in self.features([i for i, _, _ in found])}
        return [hit(brief[i], score, why) for i, score, why in found if i in brief]

    def neighbours(self, feature: int, limit: int = 10) -> list[Hit]:
        """Features whose decoder rows point the same way; the score is the cosine.

        Raises:
            FeatureError: there is none of that number.
        """
        return self._beside(self.feature(feature).neighbours[:limit], "decoder cosine {:.2f}")

    def coactive(self, feature: int, limit: int = 10) -> list[Hit]:
        """Features that fire on the same tokens; the score is the lift over chance.

        Raises:
            FeatureError: there is none of that number.
        """
        return self._beside(
            self.feature(feature).coactive[:limit], "fires with it {:.3g} times as often as chance"
        )

    def _beside(self, near: Sequence[Neighbour], why: str) -> list[Hit]:
        return self.hits([(n.feature, n.value, why.format(n.value)) for n in near])

    def features(self, ids: Sequence[int]) -> list[Feature]:
        """Brief records: figures, words, the first example and notes; unknown ids left out."""
        with self._reading() as opened:
            return store.load(opened.connection, ids, brief=True)

    def feature(self, feature: int) -> Feature:
        """The full record of a feature.

        Raises:
            FeatureError: there is none of that number.
        """
        self._check(feature)
        with self._reading() as opened:
            (found,) = store.load(opened.connection, [feature])
            return found

    def column(self, name: str) -> "NDArray[np.float32]":
        """One figure of all features, of `schema.MEASURED`; NaN where not measured.

        Raises:
            IndexingError: there is no such figure.
        """
        import numpy as np

        with self._reading() as opened:
            return np.frombuffer(store.column(opened.connection, name), "<f4")

    def max_act(self, feature: int) -> float:
        """The highest activation of a feature over the indexed text, 0 where it never fired.

        Raises:
            FeatureError: there is none of that number.
        """
        self._check(feature)
        with self._reading() as opened:
            return opened.connection.execute(
                "SELECT max_act FROM features WHERE id = ?", (feature,)
            ).fetchone()[0]

    def strength(self, feature: int, value: str | float) -> float:
        """The raw activation meant by "8x" (times max_act) or a bare number.

        Raises:
            FeatureError: no such feature, a malformed strength, or "8x" of one that never fired.
        """
        return strength(value, self.max_act(feature), feature=feature)

    def _check(self, feature: int) -> None:
        whole = isinstance(feature, int) and not isinstance(feature, bool)
        if not whole or not 0 <= feature < self.n_features:
            raise FeatureError(
                f"there is no feature {feature!r}: this SAE has features 0 to "
                f"{self.n_features - 1}; find one with `saesteer search`"
            )

    @contextmanager
    def _reading(self) -> Iterator[_Opened]:
        """This thread's connection, to the file that has the name now, in one read transaction."""
        try:
            opened: _Opened | None = getattr(self._local, "opened", None)
            if opened is not None and opened.connection.in_transaction:
                yield opened  # a question within a question
                return
            opened = self._begun()
            try:
                yield opened
            finally:
                opened.connection.rollback()
        except (sqlite3.Error, ValueError, LookupError, TypeError, struct.error, zlib.error) as e:
            raise IndexingError(
                f"{self.path} is damaged ({e}); make it again with `saesteer index`"
            ) from e

    def _begun(self) -> _Opened:
        """This thread's connection with a transaction begun, opened again where that is needed."""
        for _ in range(_TRIES):
            opened: _Opened | None = getattr(self._local, "opened", None)
            if opened is None or opened.identity != identity(self.path):
                self.close()
                opened = self._local.opened = self._open()
            if begun(opened.connection):
                return opened
            self.close()
        raise IndexingError(f"{self.path} can't be read: it is made again all the time; try later")

    def _open(self) -> _Opened:
        # Asked before: where another file comes in between, the next question opens it again.
        made = identity(self.path) if self.path.is_file() else (0, 0)
        connection = connect(self.path)
        try:
            meta = store.read_meta(connection)
            engine: TextEngine = tantivy_engine.beside(self.path, meta) or Fts5(connection)
            return _Opened(connection, made, meta, engine)
        except BaseException:
            connection.close()
            raise
