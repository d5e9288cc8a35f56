"""An example of a Neuronpedia export: its tokens, what fires there, and the words they are."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saesteer.features.neuronpedia import TOP

# Tokens kept around the one that an example is about, as the pass keeps them.
_BEFORE, _AFTER = 12, 8
_WORD = re.compile(r"\w+(?:['’]\w+)*")
# How tokenizers write a space and a newline within a token.
SPACES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})


class Spelled(NamedTuple):
    """pieces, values: a window of tokens and their activations; firing: which of them it is about;
    position: its place in the text; low: the lower end of the interval that it was drawn from, None
    for one of the strongest; around: the word before, its own and the word after; fired: each word
    of the whole text on which it fires, with its activation."""

    pieces: list[str]
    values: list[float]
    firing: int
    position: int
    low: float | None
    around: tuple[str, str, str]
    fired: list[tuple[str, float]]


def spelled(about: Mapping[str, Any]) -> tuple[Spelled, list[str]]:
    """A line of `activations/`, and all words of its text.

    Raises:
        ValueError, TypeError, LookupError: it is malformed.
    """
    pieces = [str(piece).translate(SPACES) for piece in about["tokens"]]
    given = [float(value) for value in about["values"]]
    if not pieces or len(pieces) != len(given):
        raise ValueError(f"{len(pieces)} tokens and {len(given)} activations")
    if not all(map(math.isfinite, given)):
        raise ValueError("an activation is no finite number")
    values = [max(0.0, value) for value in given]
    at_token = about.get("qualifyingTokenIndex")
    firing = max(range(len(values)), key=values.__getitem__) if at_token is None else int(at_token)
    if not 0 <= firing < len(pieces):
        raise ValueError(f"token {firing} of {len(pieces)}")
    top = about.get("binMin") is None or about.get("binContains") in (None, TOP)
    at, words = words_at(pieces)
    # A word of several tokens fires once, as strongly as its strongest token.
    fired: dict[int, float] = {}
    for word, value in zip(at, values, strict=True):
        if word is not None and value > 0:
            fired[word] = max(value, fired.get(word, 0.0))
    start = max(0, firing - _BEFORE)
    window = slice(start, firing + 1 + _AFTER)
    example = Spelled(
        pieces[window],
        values[window],
        firing - start,
        firing,
        None if top else float(about["binMin"]),
        _around(at[firing], words),
        [(words[word], value) for word, value in fired.items()],
    )
    return example, words


def words_at(pieces: Sequence[str]) -> tuple[list[int | None], list[str]]:
    """For each piece which word it is part of (the first, of several), and the words of the text.

    A run of other signs within a piece, where that has no word, is a word too; spaces are none.
    """
    at: list[int | None] = []
    words: list[str] = []
    spans = [(match.start(), match.end(), match[0]) for match in _WORD.finditer("".join(pieces))]
    begin = near = 0
    last = -1  # the span that was made a word last
    for piece in pieces:
        end = begin + len(piece)
        while near < len(spans) and spans[near][1] <= begin:
            near += 1
        first: int | None = None
        inside = near
        while begin < end and inside < len(spans) and spans[inside][0] < end:
            if inside > last:
                words.append(spans[inside][2])
                last = inside
            if first is None:
                first = len(words) - 1 - (last - inside)
            inside += 1
        if first is None and piece.strip():
            words.append(piece.strip())
            first = len(words) - 1
        at.append(first)
        begin = end
    return at, words


def _around(at: int | None, words: Sequence[str]) -> tuple[str, str, str]:
    if at is None:
        return "", "", ""
    before = words[at - 1] if at else ""
    return before, words[at], words[at + 1] if at + 1 < len(words) else ""
