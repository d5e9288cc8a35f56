"""What a comparison found, in words with intervals, and what of it may not be claimed.

Plain text from the result alone; a page or a terminal shows it as it likes.
"""

from collections.abc import Mapping
from typing import Any

from saesteer.compare.problem import FEWEST_HEADLINE, Problem
from saesteer.compare.report_limits import idle, no_gain, no_k_star, of_one, told_over
from saesteer.compare.report_numbers import (
    UNIT,
    Result,
    amount,
    chance,
    estimate,
    listed,
    measured,
    named,
    number,
    origins,
    plain,
)
from saesteer.compare.statistics import CONCEPTS_FOR_CLAIM

_KINDS = {
    "features": "the feature arm ", "vector": "the vector ", "prompt": "the prompt ",
    "trained": "the trained ", "control": "the control ", "none": "",
}  # fmt: skip
_IDLE = "no edit by either"
_OUTCOMES = ("better", "worse", "as good as", "undecided", _IDLE)


def verdicts(behaviour: Result, problem: Problem) -> list[str]:
    """A sentence for each comparison of the primary family."""
    found = [one for one in behaviour["comparisons"] if one["primary"]]
    told = [
        _neither(one, behaviour, problem)
        if idle(one, behaviour, problem)
        else sentence(one, behaviour, problem.primary.margin)
        for one in found
    ]
    made = {(one["a"], one["b"]) for one in found}
    missing = [f"{a} with {b}" for a, b in problem.primary.pairs if (a, b) not in made]
    if missing:
        told.append(f"Could not compare {listed(missing)}; see what was not run.")
    return told


def sentence(comparison: Result, behaviour: Result | None, margin: float) -> str:
    """One comparison in words. behaviour: that its arms belong to, for what kind they are."""
    first, second = comparison["a"], comparison["b"]
    difference, verdict = comparison["difference"], comparison["verdict"]
    if verdict == "worse":  # told from the winner's side
        first, second = second, first
        difference = _turned(difference)
    a, b = (_with_kind(behaviour, name) for name in (first, second))
    p = comparison.get("p_holm")
    sure = chance(comparison["p"]) if p is None else f"{chance(p)} after Holm"
    value = f"{number(difference['value'])} {UNIT}"
    told = f" {_over_groups(comparison)}".rstrip()
    if verdict in ("better", "worse"):
        return f"{_upper(a)} beats {b} by {value} ({_interval(difference)}; {sure}){told}."
    if verdict == "as good as":
        tost = chance(comparison.get("tost_p"), "TOST p")
        if comparison.get("tost_p_holm") is not None:
            tost = f"{chance(comparison['tost_p_holm'], 'TOST p')} after Holm"
        return (
            f"{_upper(a)} is as good as {b}, within the margin of {number(margin)} set beforehand: "
            f"the difference is {value} ({_interval(difference)}; "
            f"{tost}){told}."
        )
    return (
        f"Undecided between {a} and {b}: the difference is {value} ({_interval(difference)}; "
        f"{sure}){told}. They were neither told apart nor shown to be equal within "
        f"{number(margin)}."
    )


def _over_groups(comparison: Result) -> str:
    """What is left of a difference when templates are resampled, from the winner's side; or ""."""
    found = comparison.get("by_group")
    if not found:
        return ""
    verdict, difference = comparison["verdict"], found["difference"]
    if verdict == "worse":
        difference = _turned(difference)
    over = f"over the {found['groups']} templates"
    if verdict in ("better", "worse") and not told_over(found):
        return f"for these wordings; {over} it isn't told: {estimate(difference)}"
    return f"and {over}: {estimate(difference)}"


def how_sure(behaviour: Result) -> str:
    """What the intervals of the primary comparisons are."""
    found = [one["difference"] for one in behaviour["comparisons"] if one["primary"]]
    return f"Intervals of the differences: {origins(found)}." if found else ""


def across(result: Result, problem: Problem) -> list[str]:
    """The primary comparisons over all behaviours; none where there are too few for a claim."""
    found = result.get("across") or {}
    if not found or found["n_behaviours"] < CONCEPTS_FOR_CLAIM:
        return []
    n, margin = found["n_behaviours"], problem.primary.margin
    told = [one for one in found["comparisons"] if one["primary"]]
    return [f"Over {n} behaviours: {sentence(one, None, margin)}" for one in told]


def tallies(result: Result, problem: Problem) -> list[str]:
    """For each pair of the primary family, for how many behaviours it came out how."""
    lines = []
    for a, b in problem.primary.pairs:
        found = [
            _IDLE if idle(one, behaviour, problem) else one["verdict"]
            for behaviour in result["behaviours"]
            for one in behaviour["comparisons"]
            if one["primary"] and (one["a"], one["b"]) == (a, b)
        ]
        if len(found) > 1:
            told = [f"{o} for {found.count(o)}" for o in _OUTCOMES if o in found]
            lines.append(f"{a} against {b}, of {len(found)} behaviours: {listed(told)}.")
    return lines


def n_star(behaviour: Result) -> str:
    """From how many pairs on the vector keeps up with the feature."""
    found = behaviour.get("n_star")
    if not found:
        return ""
    vector, margin = found["vector"], number(found["margin"])
    pairs = (named(behaviour, found["feature"]) or {}).get("n")
    feature = f"{found['feature']} on {pairs} pairs" if pairs else found["feature"]
    tried = [one["n"] for one in behaviour["n_curve"] if one["arm"] == vector]
    if found["n"] is None:
        up_to = f" up to {max(tried)}" if tried else ""
        return (
            f"n* was not reached: at no number of pairs{up_to} was {vector} shown to be no worse "
            f"than {feature} by more than {margin} {UNIT}."
        )
    least = tried and found["n"] == min(tried)
    star = f"n* is at most {found['n']}, the smallest tried" if least else f"n* = {found['n']}"
    return (
        f"{star}: from so many pairs on, at every larger number tried too, {vector} is no worse "
        f"than {feature} by more than {margin} {UNIT}."
    )


def k_star(result: Result) -> str:
    """At how many concepts two arms cost the same, and which is cheaper on either side."""
    ledger = result.get("ledger") or {}
    found, curve = ledger.get("k_star"), ledger.get("k_curve") or []
    if not found or not curve:
        return ""
    a, b = found["a"], found["b"]
    if why := no_k_star(result):
        return f"No K* can be told of {a} and {b}: {why}."
    few, many = (_cheaper(point["costs"], a, b) for point in (curve[0], curve[-1]))
    if found["K"] is not None:
        told = f"K* = {amount(found['K'])}: at so many concepts {a} and {b} cost the same each."
        if few and many and few != many:
            told += f" With fewer {few} is cheaper, with more {many}."
        return told
    told = f"There is no K*: {a} and {b} cost the same at no number of concepts."
    return f"{told} {_upper(few)} is always cheaper." if few and few == many else told


def limits(result: Result, problem: Problem) -> list[str]:
    """What may not be claimed from this comparison, and what to hold against it."""
    run, behaviours = result["run"], result["behaviours"]
    lines = [
        f"It holds for {run['model']}, the deployment format {problem.deployment!r} and the "
        "templates of the pairs; other models and formats were not measured.",
        _across(result),
    ]
    looks = result["looks_at_test"]
    if looks > 1:
        lines.append(
            f"The test split was looked at {looks} times. No choice was made on it, but the "
            "intervals and p-values are for one look."
        )
    if problem.headline_n < FEWEST_HEADLINE or any(
        0 < arm["n"] < FEWEST_HEADLINE for one in behaviours for arm in plain(one)
    ):
        lines.append(
            f"Arms made from fewer than {FEWEST_HEADLINE} pairs are about those pairs, not about "
            "the method."
        )
    own: dict[str, list[str]] = {}
    for behaviour in behaviours:
        for line in of_one(behaviour, problem):
            own.setdefault(line, []).append(behaviour["name"])
    for line, names in own.items():
        everywhere = len(names) == len(behaviours)
        lines.append(line if everywhere else f"{listed(names)}: {line}")
    return lines


def _across(result: Result) -> str:
    across = result.get("across") or {}
    n = across.get("n_behaviours", len(result["behaviours"]))
    if n >= CONCEPTS_FOR_CLAIM:
        return f"Claims across behaviours rest on {n} of them."
    there = "there is 1" if n == 1 else f"there are {n}"
    return (
        f"Nothing is claimed across behaviours: {there}, and that takes {CONCEPTS_FOR_CLAIM} or "
        "more. Each verdict is about its own behaviour."
    )


def _neither(comparison: Result, behaviour: Result, problem: Problem) -> str:
    arms = [arm for key in ("a", "b") if (arm := named(behaviour, comparison[key]))]
    why = list(dict.fromkeys(no_gain(["either"], arm, problem.delta_ce) for arm in arms))
    if len(why) > 1:
        why = [no_gain([arm["arm"]], arm, problem.delta_ce) for arm in arms]
    return (
        f"Nothing was compared of {comparison['a']} and {comparison['b']}: {listed(why)}, so "
        "both made no edit."
    )


def _cheaper(prices: Mapping[str, Any], a: str, b: str) -> str:
    if not (measured(prices.get(a)) and measured(prices.get(b))) or prices[a] == prices[b]:
        return ""
    return a if prices[a] < prices[b] else b


def _turned(value: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate of b − a from that of a − b."""
    ends = [value.get("high"), value.get("low")]
    low, high = (None if end is None else -end for end in ends)
    return {**value, "value": -value["value"], "low": low, "high": high}


def _interval(value: Mapping[str, Any]) -> str:
    if not (measured(value.get("low")) and measured(value.get("high"))):
        return f"no interval, n = {value['n']:,}"
    return f"interval {number(value['low'])} to {number(value['high'])}, n = {value['n']:,}"


def _with_kind(behaviour: Result | None, name: str) -> str:
    arm = named(behaviour, name) if behaviour is not None else None
    return f"{_KINDS[arm['kind']]}{name}" if arm is not None else name


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith("the ") else text
