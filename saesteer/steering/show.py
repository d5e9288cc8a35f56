"""A steered text with its steered tokens marked, for a terminal or a page.

What is shown is a row of `TokenTrace`: from `Receipt.traces`, which holds the tokens that passed
through the model (the last one that `generate` wrote never does, and can be given apart), or put
together by the caller, with readings of his own.
"""

import re
import unicodedata
from collections.abc import Sequence
from html import escape
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from saesteer.steering.record import TokenTrace

_BOLD, _UNDERLINE, _DIM, _PLAIN = "\033[1m", "\033[4m", "\033[2m", "\033[0m"
_CODES = re.compile("\033\\[[0-9;]*m")
# Readings from this part of the highest on are bold in a terminal.
_STRONG = 0.5
_BARS = " ▁▂▃▄▅▆▇█"
# Tokens that are decoded at a time, so that a long text takes time in proportion to its length.
_WINDOW = 128


class _Cell(NamedTuple):
    """One character: whether its token was edited, and its token's reading as a part of the top."""

    char: str
    edited: bool
    level: float


def terminal(
    trace: Sequence[TokenTrace],
    tokenizer: Any,
    *,
    last: int | None = None,
    colour: bool = False,
    width: int | None = None,
    top: float | None = None,
) -> str:
    """One row's text: edited tokens marked, and what they read before.

    Args:
        trace: of one row.
        last: the id of the text's last token, which no pass saw.
        colour: with ANSI codes: edited tokens underlined, strong readings bold. Without, edited
            tokens stand between « and ».
        width: columns to wrap at; beneath each line stands one of bars, as high as the tokens
            above them read. None: one paragraph without bars.
        top: the reading of a full bar; by default the row's highest.
    """
    cells = _cells(trace, tokenizer, last, top)
    if width is None:
        return _styled(_marked(cells, colour), colour)
    lines = []
    for line in _wrapped(_marked(cells, colour), width):
        lines.append(_styled(line, colour))
        bars = "".join(_BARS[_height(c.level)] * _columns(c.char) for c in line).rstrip()
        if bars:
            lines.append(f"{_DIM}{bars}{_PLAIN}" if colour else bars)
    return "\n".join(lines)


def html(
    trace: Sequence[TokenTrace],
    tokenizer: Any,
    *,
    last: int | None = None,
    top: float | None = None,
) -> str:
    """The same as a paragraph: edited tokens underlined, shaded by what they read before.

    A token's title gives its readings; styles stand in the elements, so that the paragraph can be
    put into any page, light or dark.
    """
    whole, top = _whole(trace, last), _top(trace) if top is None else top
    parts, marked = [], False
    for token, text in zip(whole, _texts(whole, tokenizer), strict=True):
        line = "border-bottom:2px solid #c2410c;" if token.edited else ""
        shade = ""
        if token.before is not None and top > 0 and token.before > 0:
            share = min(1.0, token.before / top)
            shade = f"background:rgba(234,88,12,{0.5 * share:.2f});"
        title = "" if token.before is None else f"reads {token.before:.3g}"
        if token.edited and token.after is not None:
            title += f"{', ' if title else ''}set to {token.after:.3g}"
        word = text.lstrip()
        # The space before a word is no part of what is marked, but for a stretch of marked words.
        space = text[: len(text) - len(word)]
        parts.append(_span(space, line if marked else "", ""))
        parts.append(_span(word, line + shade, title))
        marked = token.edited if text else marked
    return f'<p style="white-space:pre-wrap;overflow-wrap:anywhere">{"".join(parts)}</p>'


def _span(text: str, style: str, title: str) -> str:
    attributes = f' style="{style}"' if style else ""
    attributes += f' title="{escape(title)}"' if title else ""
    return f"<span{attributes}>{escape(text)}</span>" if attributes and text else escape(text)


def columns(
    left: Sequence[str], right: Sequence[str], *, width: int = 80, indent: int = 2, gap: int = 2
) -> str:
    """Two lists of lines beside one another; lines may hold ANSI codes, and are not cut."""
    wide = column_width(width, indent=indent, gap=gap)
    lines = []
    for a, b in zip_longest(left, right, fillvalue=""):
        filled = a + " " * (wide - sum(map(_columns, _CODES.sub("", a))))
        lines.append((" " * indent + filled + " " * gap + b).rstrip())
    return "\n".join(lines)


def column_width(width: int, *, indent: int = 2, gap: int = 2) -> int:
    """Columns that each half of `columns` has."""
    return max(1, (width - indent - gap) // 2)


def wrapped(text: str, width: int) -> list[str]:
    """Text as lines of at most so many columns; control characters are made visible."""
    lines = _wrapped([_Cell(char, False, 0.0) for char in clean(text)], width)
    return ["".join(cell.char for cell in line) for line in lines]


def clean(text: str) -> str:
    """Without control characters, which a model can write as well as anyone."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def _whole(trace: Sequence[TokenTrace], last: int | None) -> list[TokenTrace]:
    return [*trace, *([] if last is None else [TokenTrace(last, False, None, None)])]


def _top(trace: Sequence[TokenTrace]) -> float:
    return max((token.before for token in trace if token.before is not None), default=0.0)


def _height(level: float) -> int:
    """Eighths of a bar; whatever is above zero can be seen."""
    return min(8, max(1, round(8 * level))) if level > 0 else 0


def _cells(
    trace: Sequence[TokenTrace], tokenizer: Any, last: int | None, top: float | None
) -> list[_Cell]:
    whole, top = _whole(trace, last), _top(trace) if top is None else top
    cells = []
    for token, text in zip(whole, _texts(whole, tokenizer), strict=True):
        level = max(0.0, token.before or 0.0) / top if top > 0 else 0.0
        blank = len(text) - len(text.lstrip())
        # The space before a word is no part of what is marked.
        cells += [_Cell(char, False, 0.0) for char in text[:blank]]
        cells += [_Cell(char, token.edited, level) for char in text[blank:]]
    return _bridged(cells)


def _bridged(cells: list[_Cell]) -> list[_Cell]:
    """Spaces between two marked words are marked too, so that a marked stretch is one."""
    out = list(cells)
    begin = 0
    for space, group in groupby(cells, key=lambda cell: cell.char.isspace()):
        end = begin + len(list(group))
        inside = begin > 0 and end < len(cells)
        if space and inside and cells[begin - 1].edited and cells[end].edited:
            out[begin:end] = [cell._replace(edited=True) for cell in cells[begin:end]]
        begin = end
    return out


def _marked(cells: list[_Cell], colour: bool) -> list[_Cell]:
    """Where there is no colour, « and » around what was edited."""
    if colour:
        return cells
    out: list[_Cell] = []
    for edited, group in groupby(cells, key=lambda cell: cell.edited):
        run = list(group)
        out += [_Cell("«", True, 0.0), *run, _Cell("»", True, 0.0)] if edited else run
    return out


def _styled(cells: Sequence[_Cell], colour: bool) -> str:
    if not colour:
        return "".join(cell.char for cell in cells)
    parts = []
    for (edited, strong), group in groupby(cells, key=lambda c: (c.edited, c.level >= _STRONG)):
        codes = (_UNDERLINE if edited else "") + (_BOLD if strong else "")
        text = "".join(cell.char for cell in group)
        parts.append(f"{codes}{text}{_PLAIN}" if codes else text)
    return "".join(parts)


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _wrapped(cells: Sequence[_Cell], width: int) -> list[list[_Cell]]:
    """Lines of at most so many columns, broken at spaces where there are any."""
    lines: list[list[_Cell]] = [[]]
    used = 0
    for space, group in groupby(cells, key=lambda cell: cell.char.isspace()):
        run = list(group)
        wide = sum(_columns(cell.char) for cell in run)
        if space:
            breaks = sum(cell.char == "\n" for cell in run)
            lines += [[] for _ in range(breaks)]
            if breaks:
                used = 0
            elif used + wide <= width:
                lines[-1] += run
                used += wide
            else:
                lines.append([])
                used = 0
            continue
        if used and used + wide > width:
            lines.append([])
            used = 0
        for cell in run:
            if used + _columns(cell.char) > width:  # a word longer than a line
                lines.append([])
                used = 0
            lines[-1].append(cell)
            used += _columns(cell.char)
    for line in lines:
        while line and line[-1].char.isspace():
            line.pop()
    return lines


def _texts(trace: Sequence[TokenTrace], tokenizer: Any) -> list[str]:
    """Each token's part of the text: what decoding grows by when it is added."""
    known: list[int] = []
    texts: list[str] = []
    before = ""
    for n, token in enumerate(trace):
        if token.id is None:
            texts.append("□")
            continue
        known.append(token.id)
        whole = tokenizer.decode(known)
        if whole.endswith("\ufffd") and any(later.id is not None for later in trace[n + 1 :]):
            texts.append("")  # half a character: it is shown with the token that ends it
            continue
        common = _common(before, whole)
        _shorten(texts, len(before) - common)  # such as the space before a full stop
        texts.append(whole[common:])
        before = whole
        if len(known) > _WINDOW:  # what follows depends on few tokens before it
            known = known[-_WINDOW // 4 :]
            before = tokenizer.decode(known)
    return [clean(text) for text in texts]


def _common(first: str, second: str) -> int:
    """How many characters the two begin with alike."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), len(second))


def _shorten(texts: list[str], by: int) -> None:
    """Take that many characters off the end of what is there."""
    for n in range(len(texts) - 1, -1, -1):
        if by <= 0:
            return
        taken = min(by, len(texts[n]))
        texts[n] = texts[n][: len(texts[n]) - taken]
        by -= taken
