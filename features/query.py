"""The language of a search: plain words, or an expression, and filters beside either.

    boat sea                    any of the words, best first
    "golden gate" AND bridge    an expression decides what is found: AND, OR, NOT (upper case),
    boat -sea (oar OR sail)     - before what is not wanted, parentheses, side by side is AND
    sail*                       words that begin so
    label:boat  token:boat  promotes:boat  context:"the boat"
    density<1%  max_act>3  output_score>=.1  own_effect>0  tag:sea  is:starred  -is:dead

Nothing else is syntax, and nothing about words is an error: an expression that can't be read is
read as plain words, and `Query.note` says so. Parentheses count only where a query has an operator.
Nothing here imports more than the standard library.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from saesteer.errors import IndexingError, did_you_mean
from saesteer.features.records import QUERY_FIELDS

# What is read of a query: nobody means the 17th word, or a word of 65 letters.
_LENGTH, _TERMS, _LETTERS = 20_000, 16, 64
# Parentheses within parentheses.
_DEPTH = 16
_FIGURES = ("density", "max_act", "output_score", "own_effect")
STATES = ("starred", "dead")

_BEGIN = r"(?<![^\s(])"
_TOKEN = re.compile(
    rf"""
      {_BEGIN}(?P<figure>{"|".join(_FIGURES)}|effect)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[^\s()]+)
    | {_BEGIN}(?P<without>-?)tag:(?:"(?P<quoted>[^"]*)"|(?P<tag>[^\s()"]+))
    | {_BEGIN}(?P<unlike>-?)is:(?P<state>\w+)
    | (?:\b(?P<field>{"|".join(QUERY_FIELDS)}):)?
        (?: "(?P<phrase>[^"]*)" | (?P<word>[^\W_]+) ) (?P<star>\*?)
    | {_BEGIN}(?P<minus>-)(?=["(\w])
    | (?P<bracket>[()])
    | (?P<open>")
    """,
    re.VERBOSE,
)
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Phrase:
    """Words that stand side by side; prefix: the last need only begin so; field: of
    `QUERY_FIELDS`, None: any."""

    words: tuple[str, ...]
    prefix: bool = False
    field: str | None = None


@dataclass(frozen=True)
class AllOf:
    parts: "tuple[Node, ...]"


@dataclass(frozen=True)
class AnyOf:
    parts: "tuple[Node, ...]"


@dataclass(frozen=True)
class Without:
    """What matches `keep`, but none of `drop`."""

    keep: "Node"
    drop: "tuple[Node, ...]"


Node = Phrase | AllOf | AnyOf | Without


@dataclass(frozen=True)
class Filter:
    """A condition on a feature: name is one of the figures, tag or is; sign is < <= > >= for
    a figure, = or != for the others."""

    name: str
    sign: str
    value: float | str


@dataclass(frozen=True)
class Query:
    """A query as it was understood.

    words: whose firing ranks what is found, one or a beginning each; expression: what must match,
    None where any of the words may; note: what could not be read as it was meant, or "".
    """

    words: tuple[Phrase, ...]
    expression: Node | None
    filters: tuple[Filter, ...]
    note: str = ""


class _MalformedError(ValueError):
    """An expression that can't be read, and why."""


def parse(text: str) -> Query:
    """Read a query.

    Raises:
        IndexingError: a filter without a number or of an unknown state; words never raise.
    """
    filters: list[Filter] = []
    tokens: list[re.Match[str]] = []
    for match in _TOKEN.finditer(text[:_LENGTH]):
        found = _filter(match)
        if found is None:
            tokens.append(match)
        else:
            filters.append(found)
    note = ""
    if _is_expression(tokens):
        try:
            expression = _Parser(tokens).whole()
        except _MalformedError as error:
            note = f"{error}, so the query was read as plain words"
        else:
            wanted = tuple(dict.fromkeys(_firing(expression)))
            return Query(wanted, expression, tuple(filters))
    texts = (m["phrase"] or m["word"] or "" for m in tokens)
    words = dict.fromkeys(word for text in texts for word in _words(text))
    return Query(tuple(Phrase((w,)) for w in list(words)[:_TERMS]), None, tuple(filters), note)


def phrases(node: Node) -> Iterator[Phrase]:
    """All phrases of an expression."""
    match node:
        case Phrase():
            yield node
        case Without(keep, drop):
            for part in (keep, *drop):
                yield from phrases(part)
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from phrases(part)


def _firing(node: Node) -> Iterator[Phrase]:
    """The words of an expression on which a feature that answers it would fire."""
    match node:
        case Phrase(words, prefix, field):
            if field in (None, "token"):
                last = len(words) - 1
                yield from (Phrase((w,), prefix and i == last) for i, w in enumerate(words))
        case Without(keep, _):
            yield from _firing(keep)
        case AllOf(parts) | AnyOf(parts):
            for part in parts:
                yield from _firing(part)


def _words(text: str) -> list[str]:
    return [word[:_LETTERS] for word in _WORD.findall(text.casefold())]


def _operator(match: re.Match[str]) -> str:
    bare = match["word"] in ("AND", "OR", "NOT") and not match["field"] and not match["star"]
    return match["word"] if bare else ""


def _is_expression(tokens: list[re.Match[str]]) -> bool:
    marks = ("field", "star", "minus", "open")
    return any(
        any(m[mark] for mark in marks) or _operator(m) or _words(m["phrase"] or "") for m in tokens
    )


class _Parser:
    """Recursive descent over the tokens of one query.

    any := all (OR all)*    all := part (AND? part)*    part := (NOT | -)* (phrase | '(' any ')')
    """

    def __init__(self, tokens: list[re.Match[str]]):
        if any(token["open"] for token in tokens):
            raise _MalformedError("a quotation mark has no partner")
        if not any(token["minus"] or _operator(token) for token in tokens):
            tokens = [token for token in tokens if not token["bracket"]]
        self._tokens = tokens
        self._at = self._depth = self._count = 0

    def whole(self) -> Node:
        node = self._any()
        if self._at < len(self._tokens):
            raise _MalformedError("a parenthesis closes nothing")
        return node

    def _next(self) -> str:
        """What comes: an operator, a bracket, "-", "phrase", or "" at the end."""
        if self._at == len(self._tokens):
            return ""
        token = self._tokens[self._at]
        return _operator(token) or token["bracket"] or token["minus"] or "phrase"

    def _any(self) -> Node:
        parts = [self._all()]
        while self._next() == "OR":
            self._at += 1
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _all(self) -> Node:
        keep: list[Node] = []
        drop: list[Node] = []
        while True:
            wanted, node = self._part()
            (keep if wanted else drop).append(node)
            if self._next() == "AND":
                self._at += 1
            elif self._next() in ("", "OR", ")"):
                break
        if not keep:
            raise _MalformedError("it only says what is not wanted")
        kept = keep[0] if len(keep) == 1 else AllOf(tuple(keep))
        return Without(kept, tuple(drop)) if drop else kept

    def _part(self) -> tuple[bool, Node]:
        wanted = True
        while self._next() in ("NOT", "-"):
            self._at += 1
            wanted = not wanted
        if self._next() == "(":
            self._at += 1
            self._depth += 1
            if self._depth > _DEPTH:
                raise _MalformedError(f"its parentheses go more than {_DEPTH} deep")
            node = self._any()
            if self._next() != ")":
                raise _MalformedError("a parenthesis is not closed")
            self._at += 1
            self._depth -= 1
            return wanted, node
        if self._next() != "phrase":
            raise _MalformedError(f"{self._next() or 'its end'!r} stands where a word should")
        token = self._tokens[self._at]
        self._at += 1
        words = _words(token["phrase"] if token["word"] is None else token["word"])
        if not words:
            raise _MalformedError("a phrase has no words")
        self._count += len(words)
        if self._count > _TERMS:
            raise _MalformedError(f"it has more than {_TERMS} words")
        return wanted, Phrase(tuple(words), bool(token["star"]), token["field"])


def _filter(match: re.Match[str]) -> Filter | None:
    if match["figure"] == "effect":
        raise IndexingError(
            f"{match[0]!r}: say output_score (does what the feature promotes become likelier?) or "
            "own_effect (does what it fires on?)"
        )
    if match["figure"]:
        return Filter(match["figure"], match["sign"], _number(match))
    if match["state"]:
        state = match["state"].casefold()
        if state not in STATES:
            raise IndexingError(
                f"no feature can be {match['state']!r}{did_you_mean(state, STATES)}; a query knows "
                f"{' and '.join(f'is:{name}' for name in STATES)}"
            )
        return Filter("is", "!=" if match["unlike"] else "=", state)
    tag = match["quoted"] or match["tag"]
    return Filter("tag", "!=" if match["without"] else "=", tag) if tag else None


def _number(match: re.Match[str]) -> float:
    text = match["bound"].removesuffix("%")
    percent = text != match["bound"]
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        example = "1%" if match["figure"] == "density" else "0.5"
        raise IndexingError(
            f"{match[0]!r} compares with no number; write {match['figure']}{match['sign']}"
            f"{example}, or put it in quotation marks to search for the words"
        )
    return float(text) / (100 if percent else 1)
