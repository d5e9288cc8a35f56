"""A dose curve as a figure: effect, cost and wear over the strength, SVG or PNG by the ending."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.effects.dose import BREAK, Dose, DoseRow, Interval
from saesteer.training.plots import COLOURS, MARKERS, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BASELINE = "#7a7a7a"


def draw(dose: Dose, path: Path, *, effect: str, unit: str = "strength") -> Path:
    """Draw a dose curve; every panel shows the baseline dashed, α_break and the suggestion.

    Args:
        effect: what the effect is, for the panel's title. unit: of the strengths, for the x axis.

    Raises:
        SaesteerError: matplotlib is missing. RunError: the folder can't be written.
    """
    rows, base = dose.rows, dose.baseline
    with drawn(path, (10.2, 5.8)) as figure:
        axes = iter(figure.subplots(2, 3).flat)
        used = [next(axes)]
        _band(used[-1], dose, [row.effect for row in rows], base.effect, effect)
        if base.words is not None:
            shares = [row.words for row in rows if row.words is not None]
            used.append(next(axes))
            _band(used[-1], dose, shares, base.words, "texts with one of the words, share")
        used.append(next(axes))
        _lines(
            used[-1],
            dose,
            {"ΔCE": lambda row: row.cost.delta_ce, "KL": lambda row: row.cost.kl},
            "cost on neutral text, nats a token",
        )
        used.append(next(axes))
        _lines(
            used[-1],
            dose,
            {
                "entropy, neutral text": lambda row: row.cost.entropy,
                "CE of its own text, unsteered": lambda row: row.text_ce,
            },
            "entropy and CE, nats a token",
        )
        used.append(next(axes))
        _lines(
            used[-1],
            dose,
            {
                "repeated 4-grams": lambda row: row.repetition,
                "distinct 2-grams": lambda row: row.distinct[1],
            },
            "generated text, shares",
        )
        used.append(next(axes))
        _lines(used[-1], dose, {"": lambda row: row.cost.relative_size}, "‖Δ‖ / ‖x‖, mean")
        for empty in axes:
            empty.set_visible(False)
        for one in used:
            _mark(one, dose)
            _strength_axis(one, _strengths(dose))
        figure.suptitle(_key(dose), x=0.01, ha="left", fontsize=9)
        figure.supxlabel(unit, fontsize=9)
    return path


def _key(dose: Dose) -> str:
    broken = [f"{s:g}" for s in (dose.break_negative, dose.break_positive) if s is not None]
    found = "none" if dose.suggested is None else f"{dose.suggested:g}"
    return (
        f"n = {dose.baseline.effect.n} prompts, band: 95% interval   dashed: baseline   "
        f"red: α_break {' and '.join(broken) or 'not reached'} (ΔCE > {BREAK:g})   "
        f"green: suggested {found} (KL ≤ {dose.kl_budget:g})"
    )


def _strengths(dose: Dose) -> list[float]:
    return [float(row.strength or 0) for row in dose.rows]


def _band(axes: "Axes", dose: Dose, found: Sequence[Interval], base: Interval, title: str) -> None:
    """Means with their intervals, and the baseline's mean."""
    x, y = _strengths(dose), [one.mean for one in found]
    axes.plot(x, y, color=COLOURS[0], marker=MARKERS[0], markersize=4, linewidth=1.2)
    bands = [(s, one.low, one.high) for s, one in zip(x, found, strict=True) if one.low is not None]
    if bands:
        at, low, high = zip(*bands, strict=True)
        axes.fill_between(at, low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
    axes.axhline(base.mean, color=_BASELINE, linestyle="--", linewidth=1.0)
    axes.set_title(title, loc="left", fontsize=9.5)


def _lines(
    axes: "Axes", dose: Dose, shown: Mapping[str, Callable[[DoseRow], float | None]], title: str
) -> None:
    """A line for each name → function of a row."""
    for number, (name, value) in enumerate(shown.items()):
        points = [(row.strength or 0.0, y) for row in dose.rows if (y := value(row)) is not None]
        # The second is hollow and broken, so that one under it is still seen.
        axes.plot(
            [s for s, _ in points],
            [y for _, y in points],
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=4 + 1.5 * number,
            markerfacecolor="none" if number else COLOURS[0],
            linestyle=(0, (4, 2)) if number else "-",
            linewidth=1.2,
            label=name or None,
        )
        height = value(dose.baseline)
        if height is not None:
            axes.axhline(height, color=COLOURS[number], linestyle="--", linewidth=0.9, alpha=0.7)
    axes.set_title(title, loc="left", fontsize=9.5)
    if len(shown) > 1:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend
        axes.legend(fontsize=8, loc="upper left", borderaxespad=0.2)


def _mark(axes: "Axes", dose: Dose) -> None:
    for broken in (dose.break_negative, dose.break_positive):
        if broken is not None:
            axes.axvline(broken, color="#b03030", linewidth=1.0, alpha=0.7)
    if dose.suggested is not None:
        axes.axvline(dose.suggested, color=COLOURS[2], linewidth=1.0)


def _strength_axis(axes: "Axes", x: Sequence[float]) -> None:
    """Strengths as ticks, on a scale on which neighbours can be told apart."""
    sizes = sorted(abs(s) for s in x if s)
    if sizes and sizes[-1] > 10 * sizes[0]:
        axes.set_xscale("symlog", linthresh=sizes[0], linscale=0.6)
    transform = axes.xaxis.get_transform()
    at = [float(place) for place in transform.transform(list(x))]
    margin = 0.05 * (at[-1] - at[0]) or 1.0
    low, high = transform.inverted().transform([at[0] - margin, at[-1] + margin])
    labels, last = [], -float("inf")
    for strength, place in zip(x, at, strict=True):
        clear = place - last > 1.4 * margin
        labels.append(f"{strength:g}" if clear else "")
        last = place if clear else last
    axes.set_xticks(list(x), labels, fontsize=8)
    axes.set_xlim(float(low), float(high))
    axes.minorticks_off()
