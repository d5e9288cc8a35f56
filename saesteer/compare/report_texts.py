"""What the report tells of generated texts: scores, a judge's, published figures, worst prompts."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from saesteer.compare.problem import Problem
from saesteer.compare.report_numbers import (
    NONE,
    UNIT,
    Result,
    amount,
    estimate,
    number,
    origins,
    title,
    worded,
)
from saesteer.compare.report_parts import folded, soft, table


def generation(behaviour: Result, problem: Problem) -> str:
    """Scores of generated texts, and what held out of distribution and on multiple choice."""
    rows, shown = [], []
    scored = ("concept", "relevance", "fluency", "harmonic")
    for arm in behaviour["arms"]:
        found = arm.get("generation") or {}
        rest = [arm.get("ood"), arm.get("choices")]
        if not found and rest == [None, None]:
            continue
        shown += [one for one in [*(found.get(k) for k in scored), *rest] if one]
        rows.append(
            [
                title(arm, problem), *(estimate(found.get(k)) for k in scored),
                number(found.get("distinct_2")), number(found.get("repetition")),
                amount(found.get("texts")), estimate(rest[0]), number(arm.get("relative_ood")),
                estimate(rest[1]),
            ]
        )  # fmt: skip
    if not rows:
        return soft("No texts were generated, and nothing was measured out of distribution.")
    head = [
        "arm", *scored, "distinct-2", "repetition", "texts", "E, OOD", "relative OOD", "choices",
    ]  # fmt: skip
    told = f"Scores from 0 to 2; {origins(shown)}."
    return table(head, rows) + soft(told) + _scales(behaviour) + _judge(behaviour, problem)


def _scales(behaviour: Result) -> str:
    """What scores 0 and what scores 2, of every scorer."""
    told = [
        f"{name} ({one['axis']}) from {number(one['fixed']['0'])} to {number(one['fixed']['2'])}"
        for name, one in (behaviour.get("scorers") or {}).items()
    ]
    return soft(f"0 and 2 in each scorer's own unit: {'; '.join(told)}.") if told else ""


def _judge(behaviour: Result, problem: Problem) -> str:
    """A judge's scores, and how far they agree with ours; "" where there was no judge."""
    rows, shown = [], []
    for arm in behaviour["arms"]:
        found = arm.get("generation") or {}
        if "judge" not in found:
            continue
        agreed = found.get("agreement") or {}
        each = [found["judge"], agreed.get("spearman"), agreed.get("ordered")]
        shown += each
        rows.append([title(arm, problem), *map(estimate, each), amount(found["judge_unread"])])
    if not rows:
        return ""
    head = ["arm", "judge", "rank correlation", "same order", "unread"]
    return table(head, rows) + soft(
        "The judge's harmonic mean, 0 to 2, and how far it agrees with the judge-free one: rank "
        "correlation over texts; of the pairs of texts that the judge tells apart, the share in "
        f"the same order. Unread: texts it gave no readable scores. {origins(shown)}."
    )


def published(behaviour: Result, problem: Problem) -> str:
    """Figures by published protocols, as named by their authors."""
    rows = [
        [title(arm, problem), f"{preset}: {name}", worded(value)]
        for arm in behaviour["arms"]
        for preset, figures in (arm.get("published") or {}).items()
        for name, value in _figures(figures or {})
    ]
    return table(["arm", "figure", "value"], rows, words=2) if rows else ""


def _figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Figures by their whole names, those within figures too."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from ((f"{name}, {inner}", each) for inner, each in _figures(value))
        else:
            yield name, NONE if value is None else value


def gallery(behaviour: Result, problem: Problem) -> str:
    """The prompts on which each arm did worst, with their texts, folded."""
    parts = []
    for arm in behaviour["arms"]:
        inside = "".join(map(_failure, arm.get("worst") or []))
        parts.append(folded(f"{title(arm, problem)}: worst prompts", inside))
    return "".join(parts) or soft("No prompt was kept.")


def _failure(one: Mapping[str, Any]) -> str:
    texts = [("prompt", one["prompt"]), ("chosen", one["chosen"]), ("rejected", one["rejected"])]
    texts += [(k, one[k]) for k in ("before", "after") if one.get(k) is not None]
    shown = "".join(f"<p><b>{name}</b> {escape(text)}</p>\n" for name, text in texts)
    gain = f"gain {number(one['gain'])} {UNIT}"
    return f'<div class="side"><b>{escape(gain)}</b>\n{shown}</div>\n'
