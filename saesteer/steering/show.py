"""A steered text with its steered tokens marked, for a terminal or a page.

What is shown are the tokens that passed through the model: the last one that `generate` wrote never
does, and is given apart.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from saesteer.steering.receipt import TokenTrace

_BOLD, _UNDERLINE, _PLAIN = "\033[1m", "\033[4m", "\033[0m"
# Readings from this part of the highest on are bold in a terminal.
_STRONG = 0.5


def terminal(
    trace: Sequence[TokenTrace], tokenizer: Any, *, last: int | None = None, colour: bool = False
) -> str:
    """One row's text: edited tokens underlined, bold where what they read before was strong.

    Args:
        trace: of one row, from `Receipt.traces`.
        last: the id of the text's last token, which no pass saw.
        colour: with ANSI codes; without, edited tokens stand between « and ».
    """
    top = _top(trace)
    shown = []
    for token, text in zip(trace, _texts(trace, tokenizer), strict=True):
        bare = text.lstrip()
        space = text[: len(text) - len(bare)]
        if token.edited and bare:
            if colour:
                strong = token.before is not None and token.before >= _STRONG * top > 0
                bare = f"{_UNDERLINE}{_BOLD if strong else ''}{bare}{_PLAIN}"
            else:
                bare = f"«{bare}»"
        shown.append(space + bare)
    if last is not None:
        shown.append(_clean(tokenizer.decode([last])))
    return "".join(shown).replace("»«", "").replace("» «", " ")


def html(trace: Sequence[TokenTrace], tokenizer: Any, *, last: int | None = None) -> str:
    """The same as a paragraph: edited tokens underlined, shaded by what they read before.

    A token's title gives its readings; styles stand in the elements, so that the paragraph can be
    put into any page.
    """
    top = _top(trace)
    parts = []
    for token, text in zip(trace, _texts(trace, tokenizer), strict=True):
        style = "border-bottom:2px solid #c2410c;" if token.edited else ""
        if token.before is not None and top > 0 and token.before > 0:
            style += f"background:rgba(234,88,12,{0.6 * token.before / top:.2f});"
        title = "" if token.before is None else f"{token.before:.3g}"
        if token.edited and token.after is not None:
            title += f" → {token.after:.3g}"
        attributes = (f' style="{style}"' if style else "") + (
            f' title="{escape(title)}"' if title else ""
        )
        body = escape(text)
        parts.append(f"<span{attributes}>{body}</span>" if attributes else body)
    if last is not None:
        parts.append(escape(_clean(tokenizer.decode([last]))))
    return f'<p style="white-space:pre-wrap">{"".join(parts)}</p>'


def _top(trace: Sequence[TokenTrace]) -> float:
    return max((token.before for token in trace if token.before is not None), default=0.0)


def _texts(trace: Sequence[TokenTrace], tokenizer: Any) -> list[str]:
    """Each token's part of the text: what decoding grows by when it is added."""
    known: list[int] = []
    texts, before = [], ""
    for token in trace:
        if token.id is None:
            texts.append("□")
            continue
        known.append(token.id)
        whole = tokenizer.decode(known)
        if whole.endswith("\ufffd"):  # half a character: it is shown with the token that ends it
            texts.append("")
            continue
        texts.append(_clean(whole[len(before) :]))
        before = whole
    return texts


def _clean(text: str) -> str:
    """Without control characters, which a model can write as well as anyone."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
