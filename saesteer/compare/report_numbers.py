"""Figures of a report.json as text, and where in it they stand."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saesteer.compare.problem import Problem
from saesteer.compare.report_plots import STYLES

NONE = "–"
"""What stands in the place of a figure that was not measured."""
UNIT = "nats a token"
Result = Mapping[str, Any]


def measured(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None) -> str:
    """Three decimals, or three digits where those would say nothing; a dash for no figure."""
    if value is None or not measured(value):
        return NONE
    if value != 0 and abs(value) < 0.0005:
        return _power(value)
    return f"{value + 0.0:.3f}" if abs(value) < 1000 else amount(value)


def amount(value: float | None) -> str:
    """A count or an amount of work: 1,280 or 3.21e12."""
    if value is None or not measured(value):
        return NONE
    if abs(value) >= 1e6:
        return _power(value)
    return f"{round(value):,}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def estimate(value: Mapping[str, Any] | float | None) -> str:
    """As 0.412 [0.301, 0.523]; without brackets where there is no interval."""
    if not isinstance(value, Mapping):
        return number(value)
    if not (measured(value.get("low")) and measured(value.get("high"))):
        return number(value["value"])
    return f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"


def worded(value: Any) -> str:
    """A figure or an estimate as text; of anything else, what Python writes of it."""
    if isinstance(value, Mapping) and "value" in value:
        return estimate(value)
    return number(value) if isinstance(value, float) and measured(value) else str(value)


def share(value: Mapping[str, Any] | None) -> str:
    """A share of something as an estimate in per cent."""
    if value is None or not measured(value["value"]):
        return NONE
    ends = [value.get("low"), value.get("high")]
    tail = f" [{ends[0]:.1%}, {ends[1]:.1%}]" if all(map(measured, ends)) else ""
    return f"{value['value']:.1%}{tail}"


def chance(p: float | None, name: str = "p") -> str:
    """As p = 0.012."""
    if p is None or not measured(p):
        return f"{name} not measured"
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.3f}"


def at(values: Mapping[str, Any] | None, delta: float) -> Any:
    """The value for one δ, the keys being numbers written out; None where there is none."""
    for key, value in (values or {}).items():
        if math.isclose(float(key), delta):
            return value
    return None


def plain(behaviour: Result) -> list[Result]:
    """The arms of a behaviour with their labels as they are, in the order of the report."""
    return [arm for arm in behaviour["arms"] if not arm.get("noise")]


def named(behaviour: Result, name: str) -> Result | None:
    """The arm of that name with its labels as they are; None where it was not run."""
    return next((arm for arm in plain(behaviour) if arm["arm"] == name), None)


def title(arm: Result, problem: Problem) -> str:
    """An arm's name, with what sets it apart from the others of that name."""
    parts = [arm["arm"]]
    if arm["n"] not in (0, problem.headline_n):
        parts.append(f"n = {arm['n']}")
    if arm.get("noise"):
        parts.append(f"{arm['noise']:.0%} label noise")
    return ", ".join(parts)


def best_first(arms: Iterable[Result], delta: float) -> list[Result]:
    """Arms by their effect at a δ, the largest first, those without one last."""

    def effect(arm: Result) -> float:
        found = at(arm["effect"], delta)
        return found["value"] if found is not None and measured(found["value"]) else -math.inf

    return sorted(arms, key=effect, reverse=True)


def leads(behaviour: Result, problem: Problem) -> dict[str, int]:
    """The arms to draw and their styles: the primary family's, a control, then the strongest."""
    there = plain(behaviour)
    others = [arm["arm"] for arm in there if arm["kind"] == "control"][:1]
    others += [arm["arm"] for arm in best_first(there, problem.delta_ce) if arm["dose"]]
    names = {arm["arm"] for arm in there}
    return {name: style for name, style in styles(others, problem).items() if name in names}


def styles(others: Iterable[str], problem: Problem) -> dict[str, int]:
    """A style for each arm, as many as there are: first those of the primary family, which so
    have the same in every plot."""
    family = [name for pair in problem.primary.pairs for name in pair]
    return dict(zip(dict.fromkeys([*family, *others]), range(STYLES), strict=False))


def origins(estimates: Iterable[Mapping[str, Any] | None]) -> str:
    """For a caption: how many values stand behind some estimates, and what their intervals are."""
    found = [one for one in estimates if one is not None]
    if not found:
        return "nothing was measured"
    counts = sorted({int(one["n"]) for one in found})
    n = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
    how = sorted({one["how"] for one in found if measured(one.get("low")) and one.get("how")})
    return f"{n}; interval: {'; '.join(how)}" if how else f"{n}; no interval"


def listed(names: Sequence[str]) -> str:
    """As a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _power(value: float) -> str:
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits}e{int(power)}"
