"""Another text engine: tantivy, for a million features and more (the extra `search`).

It stands in a folder beside the index (`features.tantivy` beside `features.sqlite`), and is used
where it is whole and was made of that index. Against FTS5 it is faster for OR, phrases and
beginnings; it stems with Snowball's English rather than Porter's, adds up the fields' BM25 rather
than joining their counts, and scores every beginning of one word alike, so that its order differs a
little.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.errors import IndexingError
from saesteer.features.engine import Scored
from saesteer.features.query import AllOf, AnyOf, Node, Phrase, Without
from saesteer.features.rank import FIELD_WEIGHTS
from saesteer.features.records import FIELDS, QUERY_FIELDS
from saesteer.features.schema import storable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Says what the folder was made of; written last.
_ABOUT = "saesteer.json"
_ANALYSER = "saesteer"
_HEAP = 256 * 2**20  # bytes


def folder_of(path: Path) -> Path:
    """Where the tantivy index of a feature index stands."""
    return path.with_suffix(".tantivy")


def build(
    path: Path, pairs: Iterable[tuple[int, Mapping[str, str]]], meta: Mapping[str, Any]
) -> None:
    """Make the tantivy index of the feature index at `path`.

    Args:
        pairs: (feature, its text by field of `FIELDS`), as `fts.build` takes them.
        meta: of the feature index; a search checks that it is the same.

    Raises:
        IndexingError: tantivy isn't installed, or the folder can't be written.
    """
    try:
        import tantivy
    except ImportError as error:
        raise IndexingError(
            "the engine tantivy is not installed; pip install 'saesteer[search]', or leave it out: "
            "the index can be searched without"
        ) from error
    folder, aside = folder_of(path), path.with_suffix(".tantivy.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        schema = tantivy.SchemaBuilder().add_integer_field("id", indexed=True, fast=True)
        for field in FIELDS:
            schema = schema.add_text_field(field, tokenizer_name=_ANALYSER)
        index = tantivy.Index(schema.build(), path=str(aside))
        index.register_tokenizer(_ANALYSER, _analyser())
        writer = index.writer(heap_size=_HEAP, num_threads=1)
        for feature, texts in pairs:
            document = tantivy.Document()
            document.add_integer("id", feature)
            for field in FIELDS:
                document.add_text(field, storable(texts.get(field, "")))
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        (aside / _ABOUT).write_text(json.dumps(dict(meta)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, ValueError) as error:
        raise IndexingError(
            f"cannot write {folder} ({error}); free some space, or leave the engine tantivy out"
        ) from error


def beside(path: Path, meta: Mapping[str, Any]) -> "Tantivy | None":
    """The tantivy index of the feature index at `path`; None where there is none, it was made of
    another index, or tantivy isn't installed."""
    folder = folder_of(path)
    try:
        if json.loads((folder / _ABOUT).read_text(encoding="utf-8")) != meta:
            return None
        return Tantivy(folder)
    except (OSError, ValueError, ImportError):
        return None


class Tantivy:
    """Search of a folder that `build` made; a `TextEngine`."""

    def __init__(self, folder: Path):
        import tantivy

        self._tantivy = tantivy
        index = tantivy.Index.open(str(folder))
        self._analyser = _analyser()
        index.register_tokenizer(_ANALYSER, self._analyser)
        self._schema = index.schema
        self._searcher = index.searcher()

    def scored(
        self,
        expression: Node,
        limit: int,
        *,
        allowed: "NDArray[np.bool_] | None" = None,
        also: Collection[int] = (),
    ) -> Scored:
        """See `TextEngine`; of equal scores at the limit any may be left out."""
        asked = self._asked(expression)
        if allowed is not None:
            everything = self._found(asked, self._searcher.num_docs)
            passed = [row for row in everything if allowed[row[0]]]
            return passed[:limit] + [row for row in passed[limit:] if row[0] in also]
        best = self._found(asked, limit)
        rest = set(also) - {i for i, _ in best}
        if not rest:
            return best
        query, occur = self._tantivy.Query, self._tantivy.Occur
        # Chosen by number, at no score of its own.
        chosen = query.const_score_query(query.term_set_query(self._schema, "id", [*rest]), 0.0)
        both = query.boolean_query([(occur.Must, asked), (occur.Must, chosen)])
        return best + self._found(both, len(rest))

    def _found(self, asked: Any, limit: int) -> Scored:
        hits = self._searcher.search(asked, max(1, limit), count=False).hits
        ids = self._searcher.fast_field_values("id", [address for _, address in hits])
        rows = zip(ids, (score for score, _ in hits), strict=True)
        return sorted(rows, key=lambda row: (-row[1], row[0]))

    def _asked(self, node: Node) -> Any:
        """An expression as tantivy's query."""
        query, occur = self._tantivy.Query, self._tantivy.Occur
        match node:
            case Phrase(words, prefix, field):
                terms = self._analyser.analyze(" ".join(words))
                if not terms:
                    return query.empty_query()
                fields = QUERY_FIELDS[field] if field else FIELDS
                parts = [
                    query.boost_query(self._phrase(name, terms, prefix), FIELD_WEIGHTS[name])
                    for name in fields
                ]
                return query.boolean_query([(occur.Should, part) for part in parts])
            case AllOf(nodes):
                return query.boolean_query([(occur.Must, self._asked(part)) for part in nodes])
            case AnyOf(nodes):
                return query.boolean_query([(occur.Should, self._asked(part)) for part in nodes])
            case Without(keep, drop):
                dropped = [(occur.MustNot, self._asked(part)) for part in drop]
                return query.boolean_query([(occur.Must, self._asked(keep)), *dropped])

    def _phrase(self, field: str, terms: list[str], prefix: bool) -> Any:
        query = self._tantivy.Query
        if len(terms) == 1:
            if prefix:
                return query.regex_query(self._schema, field, f"{re.escape(terms[0])}.*")
            return query.term_query(self._schema, field, terms[0])
        if prefix:
            return query.phrase_prefix_query(self._schema, field, [*terms])
        return query.phrase_query(self._schema, field, [*terms])


def _analyser() -> Any:
    """Words without marks over their letters, in small letters, stemmed."""
    from tantivy import Filter, TextAnalyzerBuilder, Tokenizer

    builder = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.lowercase())
    return builder.filter(Filter.ascii_fold()).filter(Filter.stemmer("english")).build()
