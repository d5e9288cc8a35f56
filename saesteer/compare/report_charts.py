"""The report's plots: what is drawn of a result, and the caption with n and the interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.compare import report_plots as plots
from saesteer.compare.problem import Problem
from saesteer.compare.report_limits import no_k_star
from saesteer.compare.report_numbers import (
    UNIT,
    Result,
    amount,
    at,
    best_first,
    leads,
    measured,
    named,
    number,
    origins,
    share,
    styles,
    title,
)
from saesteer.compare.report_parts import figure
from saesteer.compare.report_plots import Line, Point

_GAIN = f"gain in margin, {UNIT}"


def dose(behaviour: Result, problem: Problem, *, over: str = "delta_ce", level: int = 4) -> str:
    """Gain against cost, or against u, the share of α_max: a line for each lead arm."""
    drawn, names, shown = [], [], []
    for name, style in leads(behaviour, problem).items():
        arm = named(behaviour, name)
        found = [p for p in (arm or {}).get("dose") or [] if measured(p.get(over)) and p["gain"]]
        found = [p for p in found if measured(p["gain"]["value"])]
        if found:
            drawn.append(Line([_point(p[over], p["gain"]) for p in found], style))
            names.append((name, style))
            shown += [p["gain"] for p in found]
    cost = over == "delta_ce"
    svg = plots.lines(
        drawn,
        x_label=f"ΔCE on clean text, {UNIT}" if cost else "u, share of α_max",
        y_label=_GAIN,
        name=f"Dose curves of {behaviour['name']}",
        band=True,
        levels=[0.0],
        marks=[(problem.delta_ce, f"budget {problem.delta_ce:g}")] if cost else [],
    )
    caption = (
        f"{behaviour['name']}, validation prompts, each arm at its chosen setting, stronger "
        f"{'along the line' if cost else 'to the right'}. Shade: {origins(shown)}."
    )
    heading = "What a dose gains, and what it costs" if cost else "Dose curves over the strength"
    return figure(heading, svg, caption, names, level)


def n_curve(behaviour: Result, problem: Problem, *, level: int = 4) -> str:
    """Effect against the number of pairs, and a line for the feature arm."""
    curve = [one for one in behaviour["n_curve"] if _valued(one["effect"])]
    look = styles((one["arm"] for one in curve), problem)
    arms = [arm for arm in look if any(one["arm"] == arm for one in curve)]
    drawn = []
    for arm in arms:
        found = sorted((one for one in curve if one["arm"] == arm), key=lambda one: one["n"])
        # a little apart, so that intervals at the same n don't cover one another
        shift = 1 + 0.05 * (arms.index(arm) - (len(arms) - 1) / 2)
        points = [_point(one["n"] * shift, one["effect"]) for one in found]
        drawn.append(Line(points, look[arm]))
    star = behaviour.get("n_star") or {}
    feature = named(behaviour, star["feature"]) if star else None
    own = at(feature["effect"], problem.delta_ce) if feature else None
    tried = [one["n"] for one in behaviour["n_curve"] if one["arm"] == star.get("vector")]
    sign = "≤" if tried and star["n"] == min(tried) else "="
    svg = plots.lines(
        drawn,
        x_label="contrast pairs, n",
        y_label=f"effect at ΔCE ≤ {problem.delta_ce:g}",
        name=f"Effect over the number of pairs, {behaviour['name']}",
        x_log=True,
        x_ticks=sorted({one["n"] for one in curve}),
        levels=[0.0, *([own["value"]] if own and _valued(own) else [])],
        marks=[(star["n"], f"n* {sign} {star['n']}")] if star and star["n"] is not None else [],
    )
    draws = sorted({one["draws"] for one in curve})
    told = f"{draws[0]}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]}" if draws else ""
    made = f"at n = {feature['n']}" if feature and feature["n"] else "which needs no pairs"
    line = f" Dashed: {star['feature']}, {made}." if own and feature else ""
    caption = (
        f"{behaviour['name']}, {_GAIN}, on the test prompts, mean over {told} draws of pairs."
        f"{line} Bars: {origins([one['effect'] for one in curve])}. Headlines rest on n ≥ 32; "
        "fewer pairs are shown here only."
    )
    names = [(arm, look[arm]) for arm in arms]
    return figure("How many pairs it takes", svg, caption, names, level)


def k_curve(result: Result, problem: Problem, *, level: int = 4) -> str:
    """FLOPs a concept against the number of concepts, both axes logarithmic."""
    ledger = result.get("ledger") or {}
    curve = ledger.get("k_curve") or []
    look = styles((arm for one in curve for arm in one["costs"]), problem)
    names = [(arm, style) for arm, style in look.items() if _costs(curve, arm)]
    drawn = [
        Line([Point(k, cost) for k, cost in _costs(curve, arm)], style) for arm, style in names
    ]
    star = None if no_k_star(result) else (ledger.get("k_star") or {}).get("K")
    svg = plots.lines(
        drawn,
        x_label="concepts steered, K",
        y_label="FLOPs a concept",
        name="Cost a concept over the number of concepts",
        x_log=True,
        y_log=True,
        marks=[(star, f"K* = {amount(star)}")] if star is not None and star > 0 else [],
    )
    caption = (
        "What is shared, such as training the SAE and its index, is divided by the number of "
        "concepts; choosing and tuning are charged to every arm. Counted, not sampled: no interval."
    )
    return figure("What a concept costs", svg, caption, names, level)


def effects(behaviour: Result, problem: Problem, deltas: Sequence[float]) -> str:
    """The effect of every arm at every δ, with its interval."""
    rows, shown = [], []
    for arm in best_first(behaviour["arms"], problem.delta_ce):
        found = [(i, at(arm["effect"], delta)) for i, delta in enumerate(deltas)]
        valued = [(i, one) for i, one in found if one is not None and _valued(one)]
        shown += [one for _, one in valued]
        points = [
            (Point(one["value"], 0.0, one.get("low"), one.get("high")), i) for i, one in valued
        ]
        rows.append((title(arm, problem), points))
    svg = plots.forest(rows, x_label=_GAIN, name=f"Effects of all arms, {behaviour['name']}")
    names = [(f"ΔCE ≤ {delta:g}", i) for i, delta in enumerate(deltas)]
    caption = f"E(δ) on the test prompts, against no edit. {_upper(origins(shown))}."
    return figure("Every arm at every budget", svg, caption, names, solid=True)


def slopes(behaviour: Result, problem: Problem) -> str:
    """A histogram of the slopes of all prompts for each lead arm, on one axis."""
    drawn = [
        (name, arm)
        for name in leads(behaviour, problem)
        if (arm := named(behaviour, name)) is not None and arm.get("slopes")
    ]
    every = [slope for _, arm in drawn for slope in arm["slopes"]]
    if not every:
        return ""
    parts = []
    for name, arm in drawn:
        svg = plots.histogram(
            arm["slopes"], ends=(min(every), max(every)), name=f"Slopes of the prompts, {name}"
        )
        parts.append(figure(name, svg, _slope_caption(arm)))
    return f'<div class="plots">{"".join(parts)}</div>'


def _slope_caption(arm: Result) -> str:
    found = (arm.get("slope") or {}).get("alpha_max")
    if not found:
        return "Slope of the margin of each test prompt over the strength, in units of α_max."
    wrong = found["anti_steerable"]
    return (
        f"Mean {number(found['mean'])}, SD {number(found['sd'])}, in {UNIT} for α_max; "
        f"anti-steerable (light bars, below 0): {share(wrong)}, {origins([wrong])}."
    )


def _costs(curve: Sequence[Result], arm: str) -> list[tuple[float, float]]:
    """(K, FLOPs a concept) where they were counted."""
    return [(one["K"], one["costs"][arm]) for one in curve if measured(one["costs"].get(arm))]


def _point(x: float, found: Mapping[str, Any]) -> Point:
    return Point(x, found["value"], found.get("low"), found.get("high"))


def _valued(found: Mapping[str, Any] | None) -> bool:
    return found is not None and measured(found["value"])


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:] if not text.startswith("n =") else text
