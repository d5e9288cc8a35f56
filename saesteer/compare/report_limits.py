"""What the figures of a result don't carry: of one behaviour, and of the costs of two arms."""

from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.compare.problem import Problem
from saesteer.compare.report_numbers import Result, at, listed, measured, named, plain, title


def of_one(behaviour: Result, problem: Problem) -> list[str]:
    """Limits that one behaviour's arms and groups bring along."""
    delta, arms = problem.delta_ce, plain(behaviour)
    active = [arm for arm in arms if arm["kind"] not in ("none", "control")]
    lines = _groups(behaviour)
    if any(one["primary"] and one["verdict"] == "undecided" for one in behaviour["comparisons"]):
        lines.append("Undecided is not a finding of no difference: the interval says what is left.")
    controls = [
        arm["arm"]
        for arm in arms
        if arm["kind"] == "control" and _off_zero(at(arm["effect"], delta))
    ]
    if controls:
        lines.append(
            f"{listed(controls)} moved the margin as well; an effect of that size is no evidence."
        )
    none = [arm for arm in active if arm["chosen"] and at(arm["chosen"], delta) is None]
    for dear in (False, True):
        same = [arm for arm in none if _too_dear(arm, delta) == dear]
        if same:
            told = no_gain([arm["arm"] for arm in same], same[0], delta)
            lines.append(f"{told[:1].upper()}{told[1:]}; that counts as no edit.")
    over = [
        arm["arm"]
        for arm in active
        if measured(found := at(arm["delta_ce"], delta)) and found > delta
    ]
    if over:
        lines.append(
            f"{listed(over)} cost more than {delta:g} on the test text; the budget was kept on "
            "validation."
        )
    short = [
        arm["arm"] for arm in active if measured(arm["alpha_max"]) and not arm["alpha_max_reached"]
    ]
    if short:
        lines.append(f"{listed(short)} never reached ΔCE = 0.5; the strengths end before it.")
    lines += _unequal([arm for arm in arms if arm["kind"] != "none" and arm["chosen"]], problem)
    if not any(_finite(arm.get("ood")) for arm in active):
        lines.append("Nothing was measured out of distribution.")
    if not any(arm.get("generation") for arm in active):
        lines.append("No generated text was scored: the effect is on the likelihood of answers.")
    return lines


def told_over(by_group: Mapping[str, Any]) -> bool:
    """Whether the interval over groups leaves out 0."""
    return _off_zero(by_group["difference"])


def no_gain(names: Sequence[str], arm: Result, delta: float) -> str:
    """Why validation chose no edit for an arm, told of all of those names."""
    if _too_dear(arm, delta):
        return f"no strength of {listed(names)} within the cost ΔCE ≤ {delta:g} was tried"
    return f"no strength of {listed(names)} gained anything within ΔCE ≤ {delta:g} on validation"


def idle(comparison: Result, behaviour: Result, problem: Problem) -> bool:
    """Whether validation chose no edit for either arm: then they are equal, and it says nothing."""
    arms = [named(behaviour, comparison[key]) for key in ("a", "b")]
    return all(
        arm is not None and arm["chosen"] and at(arm["chosen"], problem.delta_ce) is None
        for arm in arms
    )


def no_k_star(result: Result) -> str:
    """Why nothing is told of where two arms cost the same; "" where it can be, or isn't there.

    An arm without an edit costs its looks and does nothing for it. And K* rests on the mean cost
    over behaviours, which says nothing where the cheaper arm differs from one to the other.
    """
    star = (result.get("ledger") or {}).get("k_star")
    if not star:
        return ""
    delta = result["problem"]["cost"]["delta_ce"]
    unedited: dict[str, list[str]] = {}
    cheaper: dict[str, list[str]] = {}
    for behaviour in result["behaviours"]:
        a, b = (named(behaviour, star[key]) for key in ("a", "b"))
        if a is None or b is None:
            continue
        for arm in (a, b):
            if arm["chosen"] and at(arm["chosen"], delta) is None:
                unedited.setdefault(arm["arm"], []).append(behaviour["name"])
        first, second = ((arm.get("ledger") or {}).get("flops", 0.0) for arm in (a, b))
        if measured(first) and measured(second) and first != second:
            less = a if first < second else b
            cheaper.setdefault(less["arm"], []).append(behaviour["name"])
    if unedited:
        told = [f"{arm} (for {listed(names)})" for arm, names in unedited.items()]
        return f"no edit of {listed(told)} was chosen at ΔCE ≤ {delta:g}"
    if len(cheaper) > 1:
        told = [f"{arm} for {listed(names)}" for arm, names in cheaper.items()]
        return f"which of them costs less a concept differs between behaviours, {listed(told)}"
    return ""


def _groups(behaviour: Result) -> list[str]:
    """That intervals are over prompts of a few templates, where they are."""
    if not any(one["primary"] and one.get("by_group") for one in behaviour["comparisons"]):
        return []
    groups = behaviour["splits"]["groups"]
    return [
        f"Intervals are over prompts of {groups['test']} templates (groups of pairs), and hold for "
        f"these; choices rest on {groups['validation']} validation "
        f"{'template' if groups['validation'] == 1 else 'templates'}."
    ]


def _unequal(arms: Sequence[Result], problem: Problem) -> list[str]:
    """The arms on which validation was looked at less often than on others."""
    most = max((arm["validation_evaluations"] for arm in arms), default=0)
    fewer = [
        f"{title(arm, problem)} {arm['validation_evaluations']:,}"
        for arm in arms
        if arm["validation_evaluations"] < most
    ]
    if not fewer:
        return []
    return [
        f"Validation evaluations were not equal: {listed(fewer)}, where the others had {most:,}."
    ]


def _too_dear(arm: Result, delta: float) -> bool:
    """Whether strengths were tried, and none of them cost δ or less."""
    dose = arm.get("dose") or []
    costs = [one.get("delta_ce") for one in dose]
    return bool(dose) and not any(measured(cost) and cost <= delta for cost in costs)


def _finite(value: Mapping[str, Any] | None) -> bool:
    """Whether there is an estimate with a finite value."""
    return value is not None and measured(value["value"])


def _off_zero(value: Mapping[str, Any] | None) -> bool:
    """Whether an interval leaves out 0."""
    if value is None or not (measured(value.get("low")) and measured(value.get("high"))):
        return False
    return bool(value["low"] > 0 or value["high"] < 0)
