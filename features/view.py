"""Hit lists and features as plain text for a terminal, 80 columns wide or as wide as it is.

Highlights are ANSI only where `colour` is set (a terminal); else the firing token stands between
« and ». What was not measured isn't shown.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.features import outputs
from saesteer.features.hit import Hit
from saesteer.features.records import Feature, Histogram, Neighbour, TokenStat
from saesteer.features.view_parts import (
    BOLD,
    DIM,
    around_mark,
    bars,
    clean,
    columns,
    cut,
    figures,
    fit,
    highlighted,
    label_figures,
    percent,
    places,
    quoted,
    shown_name,
    style,
    tenths,
    times,
    trimmed,
)

WIDTH = 80
_TOKENS = 10


def hits(
    found: Sequence[Hit],
    query: str,
    *,
    suggestions: Sequence[str] = (),
    advice: str = "",
    note: str | None = None,
    colour: bool = False,
    width: int = WIDTH,
) -> str:
    """A list of hits, three lines each.

    Args:
        suggestions: other queries, where a word is unknown; advice: what to try where nothing was
            found.
        note: what is to be said of how the query was read, before all else.
    """
    lines = [] if not note else [_cut(note, width)]
    if not found:
        lines.append(f"no feature matches {clean(query)!r}{advice and f'; {advice}'}")
    if suggestions:
        lines.append(f"did you mean {' or '.join(repr(clean(s)) for s in suggestions)}?")
    for number, hit in enumerate(found, 1):
        head = f"{number:>2}. {'★ ' if hit.starred else ''}feature {hit.id}  "
        tail = f"  fires on {percent(hit.density)}, max {hit.max_act:.3g}"
        label = _cut(hit.label, width - columns(head) - columns(tail))
        lines.append(f"{head}{style(label, BOLD, colour)}{tail}")
        lines.append(f"    {_why(hit, width - 4)}")
        if hit.example:
            lines.append(f"    {around_mark(clean(hit.example), width - 4, colour)}")
    return "\n".join(lines)


def _why(hit: Hit, width: int) -> str:
    """Why it was found, what it causes, who named it: in one line, the reason cut before the
    figures, tags before all else."""
    told = [] if hit.output_score is None else [f"output {hit.output_score:.2g}"]
    told += [] if hit.own_effect is None else [f"own {hit.own_effect:.2g}"]
    told += [f"label by a {hit.source}"] if hit.source == "judge" else []
    told += ["named by you"] if hit.source == "user" else []
    figures = "".join(f" · {clean(part)}" for part in told)
    tags = "".join(f" · #{clean(tag)}" for tag in hit.tags)
    return cut(_cut(hit.why, width - columns(figures)) + figures + tags, width)


def feature(
    record: Feature,
    *,
    beside: Mapping[int, str] | None = None,
    measured_with: Mapping[str, Any] | None = None,
    colour: bool = False,
    width: int = WIDTH,
    examples: int = 10,
    of_each_tenth: int = 1,
) -> str:
    """One feature: figures, tokens with their lift, promoted tokens, histograms, examples, others.

    Args:
        beside: labels of its neighbours, by number; those without one are shown by number.
        measured_with: the settings of its effects (see `outputs`).
        examples: how many of the strongest.
        of_each_tenth: how many drawn from each tenth of its activations.
    """
    note = record.note
    star = "★ " if note and note.starred else ""
    head = f"{star}feature {record.id}: {clean(shown_name(record))}"
    lines = [style(cut(head, width), BOLD, colour)]
    if note and note.name:
        lines.append(_cut(f"named by you; its label is {record.label}", width))
    if note and note.tags:
        lines.append(_cut(" ".join(f"#{tag}" for tag in note.tags), width))
    if note and note.text:
        lines += textwrap.wrap(clean(note.text), width)
    told = [label_figures(record), *(f"{name} {value}" for name, value in figures(record))]
    lines += _joined(told, width)
    if measured_with is not None and (record.output_score, record.own_effect) != (None, None):
        how = clean(f"effects measured {outputs.told(measured_with)}")
        lines += [cut(line, width) for line in textwrap.wrap(how, width)]
    if record.n_fired:
        lines += _tokens(record, width, colour)
    lines += _logits(record, width, colour)
    if record.n_fired:
        lines += _shape(record, width, colour)
        strongest = [x for x in record.examples if x.group == "top"][:examples]
        drawn = tenths(record.examples, of_each_tenth)
        for title, chosen in (
            ("strongest examples", strongest),
            ("examples from each tenth of its activations, the highest first", drawn),
        ):
            if chosen:
                lines += ["", style(title, DIM, colour)]
            for example in chosen:
                lines.append(f"{example.value:>8.3g}  {highlighted(example, width - 10, colour)}")
    labels = beside or {}
    lines += _others("nearest decoder rows (cosine)", record.neighbours, labels, width, colour)
    lines += _others(
        "fire on the same tokens (times likelier than chance)",
        record.coactive,
        labels,
        width,
        colour,
    )
    return "\n".join(lines)


def others(record: Feature) -> list[int]:
    """The features whose labels `feature` and `page.page` can show beside one."""
    return list(dict.fromkeys(n.feature for n in (*record.neighbours, *record.coactive)))


def _tokens(record: Feature, width: int, colour: bool) -> list[str]:
    lines: list[str] = []
    if record.tokens:
        head = "fires on" + " " * 16 + "share of activation    times likelier than usual"
        lines += ["", style(head, DIM, colour)]
    for token in record.tokens[:_TOKENS]:
        text = fit(quoted(token.text), 22)
        lines.append(f"  {text}{token.share:>19.1%}{token.lift:>29.1f}")
    if record.words and not record.tokens:
        lines += ["", style("fires on", DIM, colour)]
        lines.append(_cut("  " + "  ".join(word.text for word in record.words), width))
    if record.next_tokens:
        lines += ["", style("followed by (times likelier than usual)", DIM, colour)]
        lines.append(cut("  " + "  ".join(map(_next, record.next_tokens)), width))
    return lines


def _next(token: TokenStat) -> str:
    return f"{quoted(token.text)} {token.lift:.2g}"


def _logits(record: Feature, width: int, colour: bool) -> list[str]:
    lines = []
    for name, tokens in (("promotes", record.promotes), ("suppresses", record.suppresses)):
        if tokens:
            shown = "  ".join(quoted(text) for text, _ in tokens)
            lines += ["", style(name, DIM, colour), cut(f"  {shown}", width)]
    return lines


def _shape(record: Feature, width: int, colour: bool) -> list[str]:
    """Histograms on one line each, and how often it fires by place in the context."""
    lines = []
    if record.activations is not None:
        # From 0 up, so that a gap above 0 shows; one column a bin, two where there is room.
        lines.append(_histogram("activations", record.activations, width))
    if record.logits is not None:
        lines.append(_histogram("logits", record.logits, width))
    if lines:
        about = "how its activations, and its logits, are spread (counts on a root scale)"
        lines = ["", style(cut(about, width), DIM, colour), *lines]
    at = places(record.positions)
    if at:
        about = "how often it fires by place in the context (1: as often as anywhere)"
        lines += ["", style(cut(about, width), DIM, colour), *_columns(at, width)]
    return lines


def _columns(at: Sequence[tuple[str, float]], width: int) -> list[str]:
    """Places and how often it fires there, one above the other."""
    lines = ["  token ", "  times "]
    for name, ratio in at:
        value = times(ratio)
        wide = 1 + max(3, columns(name), columns(value))
        lines = [lines[0] + name.rjust(wide), lines[1] + value.rjust(wide)]
    return [cut(text, width) for text in lines]


def _histogram(name: str, histogram: Histogram, width: int) -> str:
    shown = trimmed(histogram)
    # Roots: the tail would vanish beside the commonest bin, and no bin is empty that isn't.
    heights = bars([count**0.5 for count in shown.counts])
    low, high = f"{shown.edges[0]:>8.3g} ", f" {shown.edges[-1]:.3g}"
    wide = 2 if 11 + 2 * len(heights) + len(low) + len(high) + 9 <= width else 1
    bar = "".join(block * wide for block in heights)
    return cut(f"  {name:<11}{low}{bar}{high}", width)


def _others(
    title: str,
    near: Sequence[Neighbour],
    labels: Mapping[int, str],
    width: int,
    colour: bool,
) -> list[str]:
    if not near:
        return []
    lines = ["", style(title, DIM, colour)]
    for other in near:
        head = f"{other.value:>8.3g}  feature {other.feature}  "
        label = clean(labels.get(other.feature, ""))
        lines.append((head + cut(label, width - columns(head))).rstrip())
    return lines


def _joined(parts: Sequence[str], width: int) -> list[str]:
    """Parts with · between them, on as many lines as they need."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if lines[-1] and columns(longer) > width:
            lines.append(cut(part, width))
        else:
            lines[-1] = cut(longer, width)
    return lines


def _cut(text: str, width: int) -> str:
    return cut(clean(text), width)
