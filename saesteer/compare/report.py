"""The report of a comparison as a page: one file that opens offline, nothing fetched, no script.

First what a reader with two minutes needs, then everything, for a sceptic.
"""

from collections.abc import Sequence
from html import escape

from saesteer.compare import report_charts as charts
from saesteer.compare import report_tables as tables
from saesteer.compare import report_texts as texts
from saesteer.compare import report_words as words
from saesteer.compare.problem import Problem
from saesteer.compare.problem_file import parse
from saesteer.compare.report_numbers import (
    UNIT,
    Result,
    amount,
    estimate,
    number,
    origins,
    share,
)
from saesteer.compare.report_parts import document, folded, items, soft, table
from saesteer.compare.statistics import CONCEPTS_FOR_CLAIM
from saesteer.core.tables import written
from saesteer.features.view_parts import clean


def render(result: Result) -> str:
    """The whole page of a report.json.

    Everything that comes from a model, a text or the user is escaped.

    Raises:
        ConfigError: its problem is none.
    """
    problem = parse(result["problem"], "the report's problem")
    names = ", ".join(one["name"] for one in result["behaviours"])
    title = f"Feature or vector: {clean(names)}"
    parts = [_top(result, problem, title)]
    for number_, behaviour in enumerate(result["behaviours"], 1):
        parts.append(_behaviour(behaviour, problem, result["deltas"], number_))
    parts.append(_together(result, problem))
    if result.get("world"):
        parts.append(_world(result["world"]))
    parts.append(_how(result))
    return document(title, "\n".join(parts))


def _top(result: Result, problem: Problem, title: str) -> str:
    """For a reader with two minutes."""
    run = result["run"]
    sae = f", SAE at {run['hook_point']}" if run["sae"] else ", no SAE"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [_said(line) for line in words.across(result, problem)]
    parts += [_said(line) for line in words.tallies(result, problem)]
    parts.append(
        soft(
            f"{run['model']}{sae}. Effects are gains in margin (log p of the answer wanted over "
            f"the other, {UNIT}) at ΔCE ≤ {problem.delta_ce:g} on clean text. Test split looked "
            f"at: {result['looks_at_test']}×."
        )
    )
    for behaviour in result["behaviours"]:
        said = "".join(map(_said, words.verdicts(behaviour, problem)))
        star = words.n_star(behaviour)
        parts.append(
            f'<section class="verdict"><h3>{escape(clean(behaviour["name"]))}</h3>\n{said}'
            f"{tables.family(behaviour, problem)}{f'<p>{escape(star)}</p>' if star else ''}"
            "</section>"
        )
    parts += map(soft, dict.fromkeys(map(words.how_sure, result["behaviours"])))
    star = words.k_star(result)
    if star:
        parts.append(f"<p>{escape(star)}</p>")
    first = result["behaviours"][:1]
    plots = [charts.dose(one, problem, level=3) for one in first]
    plots += [charts.n_curve(one, problem, level=3) for one in first]
    plots.append(charts.k_curve(result, problem, level=3))
    plots.append(
        '<section class="limits"><h3>What may not be claimed</h3>\n'
        f"{items(words.limits(result, problem))}</section>"
    )
    if len(result["behaviours"]) > 1:
        name = clean(result["behaviours"][0]["name"])
        parts.append(soft(f"Drawn for {name}; the other behaviours are below."))
    parts.append(f'<div class="plots">{"".join(plots)}</div>')
    parts.append(_contents(result))
    return "\n".join(parts)


def _said(line: str) -> str:
    """A sentence of the verdict."""
    return f'<p class="said">{escape(line)}</p>\n'


def _contents(result: Result) -> str:
    places = [(f"behaviour-{i}", one["name"]) for i, one in enumerate(result["behaviours"], 1)]
    places += [("together", "All behaviours"), ("how", "How it was made")]
    links = "\n".join(f'<a href="#{at}">{escape(clean(name))}</a>' for at, name in places)
    return f"<nav>Everything:\n{links}</nav>"


def _behaviour(behaviour: Result, problem: Problem, deltas: Sequence[float], place: int) -> str:
    """Everything about one behaviour."""
    plots = [charts.dose(behaviour, problem, over="u")]
    if place > 1:  # the first one's stand at the top
        plots = [charts.dose(behaviour, problem), charts.n_curve(behaviour, problem), *plots]
    plots.append(charts.effects(behaviour, problem, deltas))
    sections = [
        ("All arms at every budget", tables.arms(behaviour, problem, deltas)),
        ("Controls", tables.controls(behaviour, deltas)),
        ("Comparisons", tables.comparisons(behaviour["comparisons"])),
        ("Slopes of the prompts",
         charts.slopes(behaviour, problem) + tables.slopes(behaviour, problem)),
        ("Reading beside control", tables.reading(behaviour)),
        ("Number of pairs", _n_table(behaviour)),
        ("Generated texts, and beyond", texts.generation(behaviour, problem)),
        ("By published protocols", texts.published(behaviour, problem)),
        ("Chosen on validation", tables.chosen(behaviour, problem)),
        ("Doses, on validation", tables.doses(behaviour, problem)),
        ("What it took", tables.ledger(behaviour, problem)),
        ("Failure gallery", texts.gallery(behaviour, problem)),
        ("Splits", tables.splits(behaviour)),
    ]  # fmt: skip
    told = "\n".join(f"<h3>{name}</h3>\n{inside}" for name, inside in sections if inside)
    return (
        f'<h2 id="behaviour-{place}">{escape(clean(behaviour["name"]))}</h2>\n'
        f'{soft(behaviour["describe"])}<div class="plots">{"".join(plots)}</div>\n{told}'
    )


def _n_table(behaviour: Result) -> str:
    curve = behaviour["n_curve"]
    if not curve:
        return soft("No n-curve was measured.")
    rows = [
        [
            one["arm"], amount(one["n"]), amount(one["draws"]), estimate(one["effect"]),
            number(one["delta_ce"]), share(one.get("anti_steerable")),
        ]
        for one in curve
    ]  # fmt: skip
    head = ["arm", "n", "draws", "effect", "ΔCE", "anti-steerable"]
    told = [one[key] for one in curve for key in ("effect", "anti_steerable") if one.get(key)]
    return table(head, rows) + soft(f"Effect: gain in margin, {UNIT}; {origins(told)}.")


def _together(result: Result, problem: Problem) -> str:
    """What is not of one behaviour alone: claims across, off-target effects, shared cost."""
    parts = ['<h2 id="together">All behaviours</h2>']
    across = result.get("across") or {}
    if across:
        parts.append(soft(across.get("note", "")))
        # below sixteen a figure would be read as the claim that the note forbids
        if across["n_behaviours"] >= CONCEPTS_FOR_CLAIM:
            parts.append(tables.comparisons(across["comparisons"]))
    found = result.get("matrix")
    parts.append("<h3>Effects on the other behaviours</h3>")
    parts.append(tables.matrix(found) if found else soft("No matrix was measured."))
    together = result.get("interactions") or []
    parts.append("<h3>Several edits at once</h3>")
    parts.append(tables.interactions(together) if together else soft("None were combined."))
    ledger = result.get("ledger") or {}
    curve = ledger.get("k_curve") or []
    if curve:
        arms = list(dict.fromkeys(arm for one in curve for arm in one["costs"]))
        rows = [[amount(one["K"]), *(amount(one["costs"].get(a)) for a in arms)] for one in curve]
        parts.append(f"<h3>FLOPs a concept</h3>\n{table(['K', *arms], rows)}")
        parts.append(soft(words.k_star(result)))
    shared = ledger.get("shared")
    if shared:
        parts.append(
            soft(
                f"Shared: training the SAE {amount(shared['sae_training'])} FLOPs, indexing "
                f"{amount(shared['indexing'])}. {shared['note']}"
            )
        )
    return "\n".join(parts)


def _world(world: Result) -> str:
    """The planted language: scores between no edit (0) and the ceiling (1), and the flags."""
    rows = [
        [
            name, estimate({**one, "value": one["score"]}), number(one.get("anti_steerable")),
            number(one.get("delta_ce")),
        ]
        for name, one in world["arms"].items()
    ]  # fmt: skip
    curve = [
        [amount(one["n"]), estimate({**one, "value": one["score"]})] for one in world["n_curve"]
    ]
    found = [*world.get("flag_statistics", []), *world.get("controls", [])]
    flags = [
        [
            one["failure"], "flagged" if one["flagged"] else "not flagged", one["statistic"],
            estimate(one), number(one["threshold"]), amount(one["n"]), one["why"],
        ]
        for one in found
    ]  # fmt: skip
    head = ["failure", "found", "statistic", "value", "threshold", "n", "why"]
    star = "not reached" if world["n_star"] is None else amount(world["n_star"])
    return (
        '<h2 id="world">The planted language</h2>\n'
        f"{soft('Share of the way from no edit (0) to a context with the concept (1).')}"
        f"{table(['arm', 'score', 'anti-steerable', 'ΔCE'], rows)}"
        f"<h3>Number of pairs</h3>\n{table(['n', 'score'], curve)}{soft(f'n*: {star}.')}"
        f"<h3>Planted failures</h3>\n{table(head, flags, words=3)}"
    )


def _how(result: Result) -> str:
    """What was not run and why, what it was made with, and the exact configuration."""
    parts = ['<h2 id="how">How it was made</h2>', "<h3>Not run</h3>"]
    missed = [[one["what"], one["why"]] for one in result["not_run"]]
    rows = "".join(f"<dt>{escape(what)}</dt><dd>{escape(why)}</dd>\n" for what, why in missed)
    parts.append(f"<dl>{rows}</dl>" if rows else soft("Everything was run."))
    run = result["run"]
    facts = {
        "model": run["model"],
        "SAE": run["sae"] or "none",
        "hook point": run["hook_point"],
        "features": amount(run["d_sae"]),
        "explained variance": number(run["explained_variance"]),
        "seed": str(result["seed"]),
        "budget": f"{amount(result['budget'])} validation evaluations an arm",
        "looks at the test split": str(result["looks_at_test"]),
        "seconds": number(result["seconds"]),
        "saesteer": result["saesteer"],
        "made": result["made"],
    }
    told = "".join(f"<dt>{escape(k)}</dt><dd>{escape(clean(v))}</dd>\n" for k, v in facts.items())
    parts.append(f"<h3>Made with</h3>\n<dl>{told}</dl>")
    toml = f"<pre>{escape(written(result['problem']))}</pre>"
    parts.append(f"<h3>The exact configuration</h3>\n{folded('problem.toml', toml)}")
    return "\n".join(parts)
