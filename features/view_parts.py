"""Text for a terminal: cleaned, measured in columns, cut, highlighted; bars of block characters.

What comes from models, texts and users is shown with its control characters escaped.
"""

import unicodedata
from collections.abc import Sequence

from saesteer.features.records import Example, Feature, Histogram

BOLD, UNDERLINE, DIM, PLAIN = "\033[1m", "\033[4m", "\033[2m", "\033[0m"
# A token is underlined from this part of the example's own activation up.
_SHADE = 0.25
_BARS = "▁▂▃▄▅▆▇█"


def style(text: str, code: str, colour: bool) -> str:
    """Text in an ANSI style, where in colour."""
    return f"{code}{text}{PLAIN}" if colour and code and text else text


def clean(text: str) -> str:
    """Without anything that would move the cursor: newlines as ↵, other controls escaped."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", " ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(text: str) -> str:
    """A token with its leading space visible."""
    text = clean(text)
    return f"'{text}'" if not text.strip() else text.replace(" ", "·", text.startswith(" "))


def percent(share: float) -> str:
    return "0%" if share == 0 else f"{share:.2%}" if share >= 0.001 else f"{share:.1e}"


def shown_name(record: Feature) -> str:
    """What a feature is called: the user's name for it, else its label."""
    return (record.note and record.note.name) or record.label


def figures(record: Feature) -> list[tuple[str, str]]:
    """(name, value) of what was measured of a feature as a whole; what was not is left out."""
    found = [
        ("fires on", f"{percent(record.density)} of tokens ({record.n_fired:,})"),
        ("max", f"{record.max_act:.4g}" if record.n_fired else ""),
        # A mean of 0 over tokens where it fires can't be: it is of an import that had none.
        ("mean", f"{record.mean_act:.3g}" if record.n_fired and record.mean_act else ""),
        ("output score", _measured(record.output_score)),
        ("own effect", _measured(record.own_effect)),
        ("decoder norm", _measured(record.decoder_norm)),
    ]
    if record.token_set is not None:
        of = "" if record.token_set_score is None else f" (z {record.token_set_score:.1f})"
        found.append(("promotes the set", f"{clean(record.token_set)}{of}"))
    return [(name, value) for name, value in found if value]


def label_figures(record: Feature) -> str:
    """How sure the label is, and who wrote it."""
    told = f"label confidence {record.confidence:.2f}"
    if record.label_source != "evidence":
        score = "" if record.label_score is None else f", scored {record.label_score:.2f}"
        told = f"label by a {clean(record.label_source)}{score}"
    return told


def places(positions: Sequence[float]) -> list[tuple[str, float]]:
    """(place in the context, how often it fires there against anywhere) up to the last place where
    it fires."""
    last = max((i for i, ratio in enumerate(positions) if ratio > 0), default=-1)
    names = ["0", "1", *(f"{2**i}–{2 ** (i + 1) - 1}" for i in range(1, len(positions) - 1))]
    names[-1] = f"{2 ** (len(positions) - 2)}+" if len(positions) > 2 else names[-1]
    return list(zip(names, positions, strict=False))[: last + 1]


def times(ratio: float) -> str:
    """How many times as often, in few characters: 0, <.1, 0.8, 4.2, 37."""
    if ratio <= 0:
        return "0"
    if ratio < 0.1:
        return "<.1"
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def bars(values: Sequence[float]) -> str:
    """One block character a value, as high as it is a part of the highest; a space for 0."""
    top = max(values, default=0)
    return "".join(
        _BARS[min(7, int(8 * value / top))] if value > 0 and top > 0 else " " for value in values
    )


def trimmed(histogram: Histogram) -> Histogram:
    """Without empty bins at its two ends; a bin that holds 0 values everywhere stays one bin."""
    full = [i for i, count in enumerate(histogram.counts) if count]
    if not full:
        return Histogram(histogram.edges[:2], histogram.counts[:1])
    first, last = full[0], full[-1]
    return Histogram(histogram.edges[first : last + 2], histogram.counts[first : last + 1])


def tenths(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many examples of each tenth of a feature's activations, the highest first."""
    kept: dict[int, list[Example]] = {}
    for example in examples:
        if example.group != "top" and len(mine := kept.setdefault(example.group, [])) < most:
            mine.append(example)
    return [example for group in sorted(kept, reverse=True) for example in kept[group]]


def highlighted(example: Example, width: int, colour: bool) -> str:
    """The example on one line, the firing token marked, other firing tokens underlined."""
    shown: list[tuple[str, str]] = []
    for i, piece in enumerate(example.pieces):
        text = clean(piece)
        bare = text.lstrip()
        space = text[: len(text) - len(bare)]
        if i == example.firing:
            bare = bare if colour else f"«{bare}»"
            shown += [(space, ""), (bare, BOLD)]
        elif example.activations[i] >= _SHADE * example.value:
            shown += [(space, ""), (bare, UNDERLINE)]
        else:
            shown += [(text, "")]
    at = next(n for n, (_, code) in enumerate(shown) if code == BOLD)
    # Drop whole tokens, farther ones first, until the line fits.
    left, right, room = 0, len(shown), width - 2
    taken = sum(columns(text) for text, _ in shown)
    while taken > room and right - left > 1:
        if at - left >= right - 1 - at:
            taken -= columns(shown[left][0])
            left += 1
        else:
            right -= 1
            taken -= columns(shown[right][0])
    kept = [(cut(text, room) if taken > room else text, code) for text, code in shown[left:right]]
    # A space at either end would only shift the line.
    kept[0] = (kept[0][0].lstrip(), kept[0][1])
    line = "".join(style(text, code, colour) for text, code in kept).rstrip()
    return f"{'…' if left else ''}{line}{'…' if right < len(shown) else ''}"


def around_mark(text: str, width: int, colour: bool) -> str:
    """Text cut on both sides of «…» to a width, the mark made bold instead where in colour."""
    before, _, rest = text.partition("«")
    inside, _, after = rest.partition("»")
    inside = cut(inside, max(1, width - 4))
    room = max(0, width - columns(inside) - 4)
    side = room // 2
    left = before if columns(before) <= side else "…" + _tail(before, side - 1)
    after = cut(after, room - columns(left))
    middle = style(inside, BOLD, True) if colour else f"«{inside}»"
    return f"{left}{middle}{after}"


def columns(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def cut(text: str, width: int) -> str:
    """Text in so many columns, ended by … where there was more."""
    if columns(text) <= width:
        return text
    return f"{_head(text, width - 1)}…" if width > 0 else ""


def fit(text: str, width: int) -> str:
    """Text in exactly so many columns."""
    text = cut(text, width)
    return text + " " * (width - columns(text))


def _measured(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _head(text: str, width: int) -> str:
    taken = 0
    for i, character in enumerate(text):
        taken += columns(character)
        if taken > width:
            return text[:i]
    return text


def _tail(text: str, width: int) -> str:
    return _head(text[::-1], width)[::-1]
