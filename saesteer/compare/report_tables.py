"""Tables of the report, for a sceptic: every figure of a behaviour that is not in a plot alone."""

from collections.abc import Sequence
from html import escape

from saesteer.compare.problem import Problem
from saesteer.compare.report_numbers import (
    NONE,
    UNIT,
    Result,
    amount,
    at,
    best_first,
    chance,
    estimate,
    named,
    number,
    origins,
    share,
    title,
    worded,
)
from saesteer.compare.report_parts import folded, soft, table

_MOST_QUANTILES = ("5", "25", "50", "75", "95")


def splits(behaviour: Result) -> str:
    """Pairs and groups of every split, and the model without any edit."""
    sizes = behaviour["splits"]
    groups = sizes.get("groups") or {}
    rows = [
        [name, amount(sizes.get(name)), amount(groups.get(name))]
        for name in ("fit", "validation", "test", "ood")
    ]
    base = behaviour["base"]
    told = (
        f"Without an edit: margin {estimate(base['margin'])} {UNIT}, {origins([base['margin']])}; "
        f"CE on clean text {number(base['ce'])}."
    )
    return table(["split", "pairs", "groups"], rows) + soft(told)


def arms(behaviour: Result, problem: Problem, deltas: Sequence[float]) -> str:
    """Every arm at every δ: effect with its interval, and what it cost on the test text."""
    ranked = best_first(behaviour["arms"], problem.delta_ce)
    parts = []
    for delta in deltas:
        rows = [
            [
                title(arm, problem),
                estimate(at(arm["effect"], delta)),
                *(number(at(arm[cost], delta)) for cost in ("delta_ce", "kl", "relative_size")),
                arm["kind"],
                amount(arm["n"]),
                amount(arm["draws"]),
            ]
            for arm in ranked
        ]
        head = ["arm", "E(δ)", "ΔCE", "KL", "‖Δ‖/‖h‖", "kind", "pairs", "draws"]
        mark = ", the budget of the claims" if delta == problem.delta_ce else ""
        parts.append(f"<h4>ΔCE ≤ {delta:g}{mark}</h4>\n{table(head, rows)}")
    found = [one for arm in ranked for one in (arm["effect"] or {}).values()]
    told = (
        f"E(δ): mean gain in margin over no edit on the test prompts, {UNIT}; "
        f"{origins(found)}. ΔCE and KL, {UNIT}, on clean test text. A dash: not measured."
    )
    return "".join(parts) + soft(told)


def family(behaviour: Result, problem: Problem) -> str:
    """What each arm of the primary family did and cost at the primary δ; "" where none was run."""
    names = dict.fromkeys(name for pair in problem.primary.pairs for name in pair)
    rows = []
    for arm in filter(None, (named(behaviour, name) for name in names)):
        slopes, spent = arm.get("slope") or {}, arm.get("ledger") or {}
        slope = slopes.get("alpha_max") or slopes.get("raw") or {}
        rows.append(
            [
                arm["arm"], estimate(at(arm["effect"], problem.delta_ce)),
                number(at(arm["delta_ce"], problem.delta_ce)), share(slope.get("anti_steerable")),
                *(amount(spent.get(kind)) for kind in ("labels", "lm_tokens", "flops")),
            ]
        )  # fmt: skip
    head = ["arm", "gain", "ΔCE", "anti-steerable", "labels", "LM tokens", "FLOPs"]
    return table(head, rows) if rows else ""


def controls(behaviour: Result, deltas: Sequence[float]) -> str:
    """What moves the margin without knowing the behaviour."""
    found = [arm for arm in behaviour["arms"] if arm["kind"] == "control"]
    if not found:
        return soft("No control was run.")
    rows = [[arm["arm"], *(estimate(at(arm["effect"], d)) for d in deltas)] for arm in found]
    told = origins([one for arm in found for one in (arm["effect"] or {}).values()])
    return table(["control", *(f"δ = {d:g}" for d in deltas)], rows) + soft(
        f"Expected: intervals that hold 0. {told}."
    )


def comparisons(found: Sequence[Result]) -> str:
    """Differences between arms with their p-values."""
    if not found:
        return soft("No two arms were compared.")
    heads = {
        "p": "p", "p_holm": "p, Holm", "p_bh": "p, B–H", "tost_p": "p, TOST",
        "tost_p_holm": "TOST, Holm",
    }  # fmt: skip
    ps = [key for key in heads if any(key in one for one in found)]
    grouped = any(one.get("by_group") for one in found)
    rows = [
        [
            f"{one['a']} − {one['b']}",
            "primary" if one.get("primary") else "",
            one["verdict"],
            estimate(one["difference"]),
            *(_p(one.get(key)) for key in ps),
            *(_over_groups(one.get("by_group")) if grouped else ()),
        ]
        for one in found
    ]
    told = f"{origins([one['difference'] for one in found])}."
    if "p_bh" in ps:
        told += " B–H: Benjamini and Hochberg's correction over the behaviours."
    head = ["difference", "family", "a is", UNIT, *(heads[key] for key in ps)]
    if grouped:
        head += ["over templates", "p, templates"]
        over = [one["by_group"]["difference"] for one in found if one.get("by_group")]
        told += f" Over templates: {origins(over)}."
    return table(head, rows, words=3) + soft(told)


def _p(value: float | None) -> str:
    """A p for a column that is headed p."""
    return NONE if value is None else chance(value).removeprefix("p ").removeprefix("= ")


def _over_groups(found: Result | None) -> tuple[str, str]:
    """The difference with templates resampled, and its p."""
    return (estimate(found["difference"]), _p(found["p"])) if found else (NONE, NONE)


def slopes(behaviour: Result, problem: Problem) -> str:
    """Steerability: how the slopes of the prompts are spread, in both units."""
    rows = []
    shown = []
    for arm in behaviour["arms"]:
        for unit, name in (("raw", "strength"), ("alpha_max", "α_max")):
            found = (arm.get("slope") or {}).get(unit)
            if found:
                quantiles = found.get("quantiles") or {}
                shown.append(found["anti_steerable"])
                rows.append(
                    [
                        title(arm, problem), name, number(found["mean"]), number(found["sd"]),
                        *(number(quantiles.get(q)) for q in _MOST_QUANTILES),
                        share(found["anti_steerable"]),
                    ]
                )  # fmt: skip
    if not rows:
        return soft("No slopes were measured.")
    head = ["arm", "per", "mean", "SD", *(f"{q}%" for q in _MOST_QUANTILES), "anti-steerable"]
    return table(head, rows, words=2) + soft(
        f"Slope of each prompt's margin over 7 strengths, −1.5 to 1.5; {origins(shown)}."
    )


def doses(behaviour: Result, problem: Problem) -> str:
    """Dose tables, folded, an arm each."""
    parts = []
    for arm in behaviour["arms"]:
        if not arm.get("dose"):
            continue
        rows = [
            [
                number(one.get("u")), number(one.get("strength")), estimate(one["gain"]),
                *(number(one.get(k)) for k in ("delta_ce", "kl", "entropy", "relative_size")),
            ]
            for one in arm["dose"]
        ]  # fmt: skip
        head = ["u", "strength", "gain", "ΔCE", "KL", "entropy", "‖Δ‖/‖h‖"]
        told = (
            f"α_max {number(arm['alpha_max'])}"
            f"{'' if arm['alpha_max_reached'] else ' (ΔCE = 0.5 was not reached)'}, "
            f"α_break {number(arm.get('alpha_break'))}; "
            f"{origins([one['gain'] for one in arm['dose']])}."
        )
        parts.append(
            folded(f"{title(arm, problem)}, strength by strength", table(head, rows) + soft(told))
        )
    return "".join(parts)


def chosen(behaviour: Result, problem: Problem) -> str:
    """The setting and strength of every arm at every δ, and what validation said of them."""
    rows = []
    for arm in behaviour["arms"]:
        if arm["kind"] == "none":
            continue
        for delta, choice in (arm.get("chosen") or {}).items():
            if choice is None:
                rows.append([title(arm, problem), delta, "no edit", *[NONE] * 4])
                continue
            setting = ", ".join(f"{k} {worded(v)}" for k, v in choice["setting"].items())
            figures = ("strength", "u", "validation_gain", "validation_delta_ce")
            rows.append(
                [title(arm, problem), delta, setting, *(number(choice.get(k)) for k in figures)]
            )
    if not rows:
        return soft("Nothing was chosen.")
    return table(["arm", "δ", "setting", "strength", "u", "gain", "ΔCE"], rows, words=3)


def reading(behaviour: Result) -> str:
    """AUROC of directions and features as classifiers, a column for each set of labels."""
    found = behaviour.get("reading") or []
    if not found:
        return soft("Nothing was read.")
    labels = list(dict.fromkeys(one["labels"] for one in found))
    values = {(one["arm"], one["labels"]): one["auroc"] for one in found}
    names = dict.fromkeys(one["arm"] for one in found)
    rows = [[name, *(estimate(values.get((name, label))) for label in labels)] for name in names]
    told = f"AUROC, .5 is chance; {origins([one['auroc'] for one in found])}."
    return table(["arm", *labels], rows) + soft(f"{told} Reading well is not steering well.")


def ledger(behaviour: Result, problem: Problem) -> str:
    """Labels, tokens, FLOPs and seconds of every arm, and its looks at validation."""
    rows = []
    for arm in behaviour["arms"]:
        spent = arm.get("ledger") or {}
        kinds = ("labels", "lm_tokens", "flops")
        rows.append(
            [
                title(arm, problem), *(amount(spent.get(k)) for k in kinds),
                number(spent.get("seconds")), amount(arm["validation_evaluations"]),
                amount(arm.get("failed_draws", 0)),
            ]
        )  # fmt: skip
    head = ["arm", "labels", "LM tokens", "FLOPs", "seconds", "validation", "failed draws"]
    return table(head, rows) + soft(
        "Validation: settings × strengths tried there, the same budget for every arm. Failed "
        "draws: of pairs from which the arm could not be made, counted as no edit."
    )


def matrix(found: Result) -> str:
    """Effect of steering each behaviour on every other one, a table for each arm."""
    names, parts = found["behaviours"], []
    for arm, rows in found["arms"].items():
        body = [[name, *map(estimate, row)] for name, row in zip(names, rows, strict=True)]
        parts.append(f"<h4>{escape(arm)}</h4>\n{table(['steered for', *names], body)}")
    every = [one for rows in found["arms"].values() for row in rows for one in row]
    return "".join(parts) + soft(f"Gain in margin, {UNIT}; {origins(every)}.")


def interactions(found: Sequence[Result]) -> str:
    """Two edits at once."""
    figures = ("first", "second", "together", "interaction", "order")
    rows = [[one["a"], one["b"], *(estimate(one.get(k)) for k in figures)] for one in found]
    head = ["A", "B", "E(A)", "E(B)", "E(A+B)", "interaction", "order"]
    told = origins([one.get(k) for one in found for k in figures])
    return table(head, rows, words=2) + soft(
        "Interaction: E(A+B) − E(A) − E(B), 0 where they add up. "
        f"Order: E(A, then B) − E(B, then A). {told}."
    )
