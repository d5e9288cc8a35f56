"""A result for a terminal, within 80 columns: the verdict, the arms, what may not be claimed."""

import textwrap

from saesteer.compare import report_words as words
from saesteer.compare.problem import Problem
from saesteer.compare.problem_file import parse
from saesteer.compare.report_numbers import (
    NONE,
    Result,
    amount,
    at,
    best_first,
    estimate,
    number,
    title,
)
from saesteer.features.view_parts import BOLD, clean, columns, cut, fit, style

WIDTH = 80
_NAME = 28


def shown(result: Result, *, colour: bool = False) -> str:
    """What a report says, at most 80 columns wide.

    colour: ANSI styles, for a terminal.

    Raises:
        ConfigError: its problem is none.
    """
    problem = parse(result["problem"], "the report's problem")
    lines = []
    for behaviour in result["behaviours"]:
        lines.append(style(cut(clean(behaviour["name"]), WIDTH), BOLD, colour))
        told = [*words.verdicts(behaviour, problem), words.n_star(behaviour)]
        for line in told:
            lines += _wrapped(line)
        lines += ["", *_arms(behaviour, problem), *_curve(behaviour), ""]
    for line in (
        *words.across(result, problem),
        *words.tallies(result, problem),
        words.k_star(result),
    ):
        lines += _wrapped(line)
    lines += ["", style("what may not be claimed", BOLD, colour)]
    for line in words.limits(result, problem):
        lines += _wrapped(line, "- ")
    if result["not_run"]:
        lines += ["", style("not run", BOLD, colour)]
        for one in result["not_run"]:
            lines += _wrapped(f"{one['what']}: {one['why']}", "- ")
    return "\n".join(line.rstrip() for line in lines)


def _arms(behaviour: Result, problem: Problem) -> list[str]:
    """A line for each arm at the primary δ."""
    delta = problem.delta_ce
    head = f"{'arm':<{_NAME}}{f'E(δ), ΔCE ≤ {delta:g}':>24}{'ΔCE':>8}{'anti':>8}{'FLOPs':>11}"
    lines = [head]
    for arm in best_first(behaviour["arms"], delta):
        slopes = arm.get("slope") or {}
        wrong = (slopes.get("alpha_max") or slopes.get("raw") or {}).get("anti_steerable")
        part = f"{wrong['value']:.1%}" if wrong else NONE
        lines.append(
            f"{fit(clean(title(arm, problem)), _NAME - 1)} "
            f"{estimate(at(arm['effect'], delta)):>24}"
            f"{number(at(arm['delta_ce'], delta)):>8}"
            f"{part:>8}"
            f"{amount((arm.get('ledger') or {}).get('flops')):>11}"
        )
    return lines


def _curve(behaviour: Result) -> list[str]:
    """A line for each arm of the n-curve: its effect at every n."""
    curve = behaviour["n_curve"]
    if not curve:
        return []
    every = sorted({one["n"] for one in curve})
    values = {(one["arm"], one["n"]): one["effect"] for one in curve}
    wide = max(7, *(columns(str(n)) + 1 for n in every))
    lines = ["", f"{'effect by number of pairs':<{_NAME}}{''.join(f'{n:>{wide}}' for n in every)}"]
    for arm in dict.fromkeys(one["arm"] for one in curve):
        found = [values.get((arm, n)) for n in every]
        cells = "".join(f"{number(one['value'] if one else None):>{wide}}" for one in found)
        lines.append(f"{fit(clean(arm), _NAME - 1)} {cells}")
    return [cut(line, WIDTH) for line in lines]


def _wrapped(text: str, mark: str = "") -> list[str]:
    return textwrap.wrap(
        clean(text),
        WIDTH,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_on_hyphens=False,
    )
