"""Hit lists and features as plain text for a terminal, 80 columns wide.

Highlights are ANSI only where `colour` is set (a terminal); else the firing token stands between
« and ». What comes from models and texts is shown with its control characters escaped.
"""

import unicodedata
from collections.abc import Sequence

from saesteer.features.search import Hit
from saesteer.features.store import Example, Feature

WIDTH = 80
_BOLD, _UNDERLINE, _PLAIN = "\033[1m", "\033[4m", "\033[0m"
# A token is shaded from this part of the example's highest activation up.
_SHADE = 0.25


def hits(found: Sequence[Hit], query: str, *, colour: bool = False, width: int = WIDTH) -> str:
    """A list of hits, three lines each."""
    if not found:
        return (
            f"no feature matches {_clean(query)!r}; try a word that the text is likely to hold, "
            "or a shorter one"
        )
    lines = []
    for number, hit in enumerate(found, 1):
        head = f"{number:>2}. feature {hit.id}  "
        tail = f"  fires on {_percent(hit.density)}, max {hit.max_act:.3g}"
        label = _cut(_clean(hit.label), width - _columns(head) - _columns(tail))
        lines.append(f"{head}{_style(label, _BOLD, colour)}{tail}")
        lines.append(f"    {_cut(_clean(hit.why), width - 4)}")
        if hit.example:
            lines.append(f"    {_around_mark(_clean(hit.example), width - 4, colour)}")
    return "\n".join(lines)


def feature(
    record: Feature, *, colour: bool = False, width: int = WIDTH, examples: int = 10
) -> str:
    """One feature: numbers, tokens with their lift, promoted and suppressed tokens, examples."""
    lines = [
        _style(_cut(f"feature {record.id}: {_clean(record.label)}", width), _BOLD, colour),
        _cut(
            f"label confidence {record.confidence:.2f} · fires on {_percent(record.density)} of "
            f"tokens ({record.n_fired:,}) · max {record.max_act:.4g} · mean {record.mean_act:.3g}",
            width,
        ),
    ]
    if not record.n_fired:
        return "\n".join([*lines, *_logit_lines(record, width)])
    lines += ["", "fires on" + " " * 16 + "share of activation    times likelier than usual"]
    for token in record.tokens[:10]:
        text = _fit(_quoted(token.text), 22)
        lines.append(f"  {text}{token.share:>19.1%}{token.lift:>29.1f}")
    lines += _logit_lines(record, width)
    lines += ["", "strongest examples"]
    for example in record.examples[:examples]:
        lines.append(f"{example.value:>8.3g}  {_highlighted(example, width - 10, colour)}")
    return "\n".join(lines)


def _logit_lines(record: Feature, width: int) -> list[str]:
    lines = []
    for name, tokens in (("promotes", record.promotes), ("suppresses", record.suppresses)):
        if tokens:
            shown = "  ".join(_quoted(text) for text, _ in tokens)
            lines += ["", name, _cut(f"  {shown}", width)]
    return lines


def _highlighted(example: Example, width: int, colour: bool) -> str:
    """The example on one line, the firing token marked, other firing tokens underlined."""
    shown: list[tuple[str, str]] = []
    for i, piece in enumerate(example.pieces):
        text = _clean(piece)
        bare = text.lstrip()
        space = text[: len(text) - len(bare)]
        if i == example.firing:
            bare = bare if colour else f"«{bare}»"
            shown += [(space, ""), (bare, _BOLD)]
        elif example.activations[i] >= _SHADE * example.value:
            shown += [(space, ""), (bare, _UNDERLINE)]
        else:
            shown += [(text, "")]
    at = next(n for n, (_, style) in enumerate(shown) if style == _BOLD)
    # Drop whole tokens, farther ones first, until the line fits.
    left, right = 0, len(shown)
    while sum(_columns(text) for text, _ in shown[left:right]) > width - 2 and right - left > 1:
        if at - left >= right - 1 - at:
            left += 1
        else:
            right -= 1
    line = "".join(
        _style(text, style, colour) if style else text for text, style in shown[left:right]
    )
    return f"{'…' if left else ''}{line.strip()}{'…' if right < len(shown) else ''}"


def _around_mark(text: str, width: int, colour: bool) -> str:
    """Text cut on both sides of «…» to a width, the mark made bold instead where in colour."""
    before, _, rest = text.partition("«")
    inside, _, after = rest.partition("»")
    room = max(0, width - _columns(inside) - 4)
    side = room // 2
    left = before if _columns(before) <= side else "…" + _tail(before, side - 1)
    after = _cut(after, room - _columns(left))
    middle = _style(inside, _BOLD, True) if colour else f"«{inside}»"
    return f"{left}{middle}{after}"


def _style(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_PLAIN}" if colour and style and text else text


def _clean(text: str) -> str:
    """Without anything that would move the cursor: newlines as ↵, other controls escaped."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", " ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(text: str) -> str:
    """A token with its leading space visible."""
    text = _clean(text)
    return f"'{text}'" if not text.strip() else text.replace(" ", "·", text.startswith(" "))


def _percent(share: float) -> str:
    return "0%" if share == 0 else f"{share:.2%}" if share >= 0.001 else f"{share:.1e}"


def _columns(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _cut(text: str, width: int) -> str:
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - 1:
        text = text[:-1]
    return f"{text}…" if width > 0 else ""


def _tail(text: str, width: int) -> str:
    while text and _columns(text) > width:
        text = text[1:]
    return text


def _fit(text: str, width: int) -> str:
    text = _cut(text, width)
    return text + " " * (width - _columns(text))
