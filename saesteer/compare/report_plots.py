"""Plots as inline SVG: lines with intervals, a forest of intervals, a histogram.

Drawn by hand, so that a page needs nothing else. Colours are classes of the page's style, light and
dark; lines differ by dash and marker too, so that a grey print can be read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

STYLES = 6
"""As many lines can be told apart in one plot."""
LEAST = 1e-9
"""What is smaller counts as 0: logarithmic axes leave it out, and no axis is shorter."""
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 16, 50
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BARS, _BAR_HEIGHT, _ROW = 24, 84, 12


@dataclass(frozen=True)
class Point:
    """One point, with the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points to be joined in their order; `style` chooses colour, dash and marker."""

    points: Sequence[Point]
    style: int


@dataclass(frozen=True)
class _Scale:
    """From values to places; log needs values above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def lines(
    drawn: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    name: str,
    x_log: bool = False,
    y_log: bool = False,
    x_ticks: Sequence[float] = (),
    band: bool = False,
    levels: Sequence[float] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines with their intervals; "" where there is no point.

    Args:
        name: what the plot shows, for those who can't see it.
        x_log, y_log: logarithmic axes; points at 0 or below are left out there.
        x_ticks: where to label the x axis, rather than at round numbers.
        band: intervals as a shade around the line, rather than as a bar through each point.
        levels: heights of horizontal lines. marks: vertical lines, each with its text.
    """
    kept = [
        Line([p for p in line.points if (p.x > LEAST or not x_log) and (p.y > LEAST or not y_log)],
             line.style)
        for line in drawn
    ]  # fmt: skip
    points = [point for line in kept for point in line.points]
    if not points:
        return ""
    ends = [end for p in points for end in (p.low, p.high) if end is not None]
    heights = [p.y for p in points] + [*levels] + ends
    x = _scale([p.x for p in points] + [v for v, _ in marks], (_LEFT, _WIDTH - _RIGHT), x_log)
    y = _scale([h for h in heights if h > LEAST or not y_log], (_HEIGHT - _BOTTOM, _TOP), y_log)
    parts = [_axes(x, y, x_label, y_label, x_ticks)]
    parts += [_rule(_LEFT, y(value), _WIDTH - _RIGHT, y(value)) for value in levels]
    for value, text in marks:
        at = x(value)
        parts.append(_rule(at, _TOP, at, _HEIGHT - _BOTTOM))
        late = at > _WIDTH * 0.6
        parts.append(_text(at + (-4 if late else 4), _TOP + 10, text, "end" if late else "start"))
    parts += [_shade(line, x, y) if band else _whiskers(line, x, y) for line in kept]
    parts += [_joined(line, x, y) for line in kept]
    return _svg(_HEIGHT, name, "".join(parts))


def forest(
    rows: Sequence[tuple[str, Sequence[tuple[Point, int]]]], *, x_label: str, name: str
) -> str:
    """A row for each title, with an interval (x and its ends) for each of its estimates.

    rows: (title, [(point with y unused, style)]); a row without points says that it has none.
    """
    points = [point for _, found in rows for point, _ in found]
    if not points:
        return ""
    values = [0.0, *(p.x for p in points)]
    values += [end for p in points for end in (p.low, p.high) if end is not None]
    x = _scale(values, (8, _WIDTH - _RIGHT), False)
    parts, top = [], 4
    for title, found in rows:
        parts.append(_text(0, top + 12, title if found else f"{title}: not measured", "start"))
        top += 20
        for point, style in found:
            if point.low is not None and point.high is not None:
                parts.append(_stroke(x(point.low), top, x(point.high), top, style, solid=True))
            parts.append(_marker(style, x(point.x), top))
            top += _ROW
        top += 4
    parts.insert(0, _rule(x(0), 4, x(0), top))
    parts.append(_stroke(8, top, _WIDTH - _RIGHT, top, None))
    parts += [_text(x(t), top + 16, _round(t), "middle", "tick") for t in _ticks(x)]
    parts.append(_text(_WIDTH / 2, top + 36, x_label, "middle", "axis"))
    return _svg(top + 44, name, "".join(parts))


def histogram(values: Sequence[float], *, ends: tuple[float, float], name: str) -> str:
    """Counts of values between two ends; those below 0, anti-steerable, are light."""
    if not values:
        return ""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    width = (high - low if high - low > LEAST else 1.0) / _BARS
    # 0 is an edge, so that no bar is both above and below it
    first, last = math.floor(low / width), max(math.ceil(high / width), 1)
    edges = width * np.arange(first, last + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    x = _Scale(float(edges[0]), float(edges[-1]), 8, _WIDTH - _RIGHT)
    parts = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        tall = (_BAR_HEIGHT - 8) * count / counts.max()
        kind = "below" if right <= width / 2 else "above"
        parts.append(
            f'<rect class="{kind}" x="{x(left) + 0.5:.1f}" y="{_BAR_HEIGHT - tall:.1f}" '
            f'width="{max(x(right) - x(left) - 1, 0.5):.1f}" height="{tall:.1f}"/>'
        )
    parts.append(_stroke(8, _BAR_HEIGHT, _WIDTH - _RIGHT, _BAR_HEIGHT, None))
    parts.append(_rule(x(0), 0, x(0), _BAR_HEIGHT))
    parts += [_text(x(t), _BAR_HEIGHT + 15, _round(t), "middle", "tick") for t in _ticks(x)]
    return _svg(_BAR_HEIGHT + 20, name, "".join(parts))


def key(style: int, *, solid: bool = False) -> str:
    """The sign of a style, for a legend; solid: without its dashes."""
    stroke = _stroke(1, 8, 39, 8, style, solid=solid)
    return f'<svg viewBox="0 0 40 16" aria-hidden="true">{stroke}{_marker(style, 20, 8)}</svg>'


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str, x_ticks: Sequence[float]) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in _ticks(y):
        at = y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 6, at + 4, _label(tick, y.log), "end", "tick"))
    for tick in x_ticks or _ticks(x):
        at = x(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {bottom}v5"/>')
        text = _round(tick) if x_ticks else _label(tick, x.log)
        parts.append(_text(at, bottom + 19, text, "middle", "tick"))
    parts.append(_stroke(_LEFT, bottom, right, bottom, None))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, x_label, "middle", "axis"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(12 {middle:.0f}) '
        f'rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _joined(line: Line, x: _Scale, y: _Scale) -> str:
    places = [(x(p.x), y(p.y)) for p in line.points]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    style = line.style % STYLES
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    line_ = f'<polyline class="line s{style}" points="{path}"{dash}/>' if path else ""
    return line_ + "".join(_marker(style, *place) for place in places)


def _whiskers(line: Line, x: _Scale, y: _Scale) -> str:
    return "".join(
        f'<path class="line thin s{line.style % STYLES}" '
        f'd="M{x(p.x):.1f} {y(p.low):.1f}V{y(p.high):.1f}"/>'
        for p in line.points
        if p.low is not None and p.high is not None and (p.low > LEAST or not y.log)
    )


def _shade(line: Line, x: _Scale, y: _Scale) -> str:
    found = [
        (x(p.x), y(p.low), y(p.high))
        for p in line.points
        if p.low is not None and p.high is not None and (p.low > LEAST or not y.log)
    ]
    edge = [(at, high) for at, _, high in found] + [(at, low) for at, low, _ in reversed(found)]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in edge)
    return f'<polygon class="band f{line.style % STYLES}" points="{path}"/>' if path else ""


def _marker(style: int, x: float, y: float) -> str:
    """Disc, square, triangle, diamond, hollow disc, cross: filled with the line's colour."""
    style %= STYLES
    if style in (0, 4):
        hollow = " hollow" if style == 4 else ""
        return f'<circle class="mark f{style} s{style}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    shape = {
        1: "M-3.8-3.8h7.6v7.6h-7.6z", 2: "M0-5L4.8 3.6H-4.8z", 3: "M0-5.2L5.2 0 0 5.2-5.2 0z",
        5: "M-4-4L4 4M4-4L-4 4",
    }[style]  # fmt: skip
    move = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="mark f{style} s{style}" {move} d="{shape}"/>'


def _stroke(
    x1: float, y1: float, x2: float, y2: float, style: int | None, *, solid: bool = False
) -> str:
    """A line in a style, or an axis."""
    d = f'd="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"'
    if style is None:
        return f'<path class="rule" {d}/>'
    style %= STYLES
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] and not solid else ""
    return f'<path class="line s{style}" {d}{dash}/>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="rule dashed" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "note") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, name: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">'
        f"{inside}</svg>"
    )


def _scale(values: Sequence[float], place: tuple[float, float], log: bool) -> _Scale:
    low, high = float(min(values)), float(max(values))
    if log:
        room = float((high / low) ** 0.04) if high > low else 2.0
        return _Scale(low / room, high * room, *place, log=True)
    flat = high - low <= LEAST * max(1.0, abs(low), abs(high))
    margin = max(abs(high), 1.0) if flat else 0.05 * (high - low)
    return _Scale(low - margin, high + margin, *place)


def _ticks(scale: _Scale) -> list[float]:
    """Round numbers within a scale, about six of them."""
    if scale.log:
        first, last = math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high))
        found = [10.0**power for power in range(first, last + 1, max(1, (last - first) // 6 + 1))]
        if len(found) < 2:
            between = (m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5))
            found = [value for value in between if scale.low <= value <= scale.high]
        return found if len(found) > 1 else [scale.low, scale.high]
    rough = (scale.high - scale.low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    places = range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)
    return [place * step for place in places]


def _label(value: float, log: bool) -> str:
    digits, _, power = f"{value:.1e}".partition("e")
    if not log or abs(int(power)) <= 5:
        return _round(float(f"{value:.2g}") if log else value)
    first = f"{digits.removesuffix('.0')}·" if digits != "1.0" else ""
    return f"{first}10{str(int(power)).translate(_RAISED)}"


def _round(value: float) -> str:
    return f"{value + 0.0:,.10g}"  # no minus before a 0
