"""Search on the planted language, where the truth is known, over a few SAEs (--seeds).

Each SAE is trained as `saesteer demo` trains its own (configs/demo.toml, on other stories a seed),
and indexed with the effects of all features. A concept is asked for by its name and by three other
words of its lexicon. "Fires on": a feature is right that tells the concept's words from all others
with AUROC of .9 or more, and no other concept's better. "Causes": one that goes a quarter of the
way to the ceiling when it is added; of the hits of either order those that do are right. Where no
feature is right for a concept all its queries miss, whatever the search does: "of the rest" is over
the other concepts. The read-only concept changes nothing: it is to be found by match, and ranked
down by effect.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

from saesteer import enrich, fitting, stages
from saesteer.cli.demo import STORIES, demo_config, write_stories
from saesteer.effects import planted
from saesteer.effects.planted_search import SearchScore
from saesteer.run import Run
from saesteer.world.corpus import DOCUMENT_SEPARATOR

TITLE = "Search on the planted language"


def measure(folder: Path, seed: int, stories: int) -> dict[str, Any]:
    """Train and index one SAE in a folder, and search it."""
    begin = time.monotonic()
    config = demo_config(folder, seed)
    text = Path(config.text.source)
    write_stories(text, seed)
    if stories < STORIES:
        between = f"\n{DOCUMENT_SEPARATOR}\n"
        told = text.read_text(encoding="utf-8").split(between)
        text.write_text(between.join(told[:stories]), encoding="utf-8")
        part = stories / STORIES
        config = dataclasses.replace(
            config,
            cache=dataclasses.replace(config.cache, tokens=int(config.cache.tokens * part)),
            train=dataclasses.replace(config.train, tokens=int(config.train.tokens * part)),
        )
    # As the demo: trained in float64, which gives one SAE on every machine, and used as configured.
    exact = dataclasses.replace(config.model, dtype="float64")
    fitting.train(Run.create(dataclasses.replace(config, model=exact)))
    run = Run(folder, config)
    run.save_config()
    index = stages.index(run)
    enrich.effects(run, range(index.n_features))
    report = planted.measure_search(run.model, run.sae, run.index, seed=seed)
    found = figures(report) | {"seed": seed, "seconds": round(time.monotonic() - begin)}
    print(f"seed {seed}: {found['seconds']} s", file=sys.stderr)
    return found


def figures(report: planted.SearchReport) -> dict[str, Any]:
    """A report as plain values."""
    return {
        "fires_on": score(report.fires_on),
        "causes": {sort: score(one) for sort, one in report.causes.items()},
        "read_only": [dataclasses.asdict(one) for one in report.read_only],
    }


def score(found: SearchScore) -> dict[str, Any]:
    """precision@1 and MRR over all concepts, and over those that a feature is right for."""
    precision, mrr = found.over_the_rest() or (None, None)
    return {
        "precision_at_1": found.precision_at_1,
        "mrr": found.mrr,
        "concepts": found.concepts,
        "without": list(found.without),
        "rest_precision_at_1": precision,
        "rest_mrr": mrr,
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    fires_on = [{"seed": row["seed"], **columns(row["fires_on"])} for row in rows]
    causes = [
        {"seed": row["seed"], "order": sort, **columns(row["causes"][sort])}
        for row in rows
        for sort in planted.SORTS
    ]
    read_only = [
        {
            "seed": row["seed"],
            "concept": one["concept"],
            "its feature": one["feature"],
            "AUROC": one["auroc"],
            "right": "yes" if one["right"] else "no",
            "own effect": shown(one["own_effect"]),
            "MRR by match": one["mrr"]["match"],
            "MRR by effect": one["mrr"]["effect"],
        }
        for row in rows
        for one in row["read_only"]
    ]
    return "\n\n".join(
        [
            f"`python benchmarks/planted_search.py`. {results.machine('numpy')}",
            " ".join(__doc__.split("\n\n")[1].split()),
            f"Fires on, hits by match:\n\n{results.table(fires_on)}",
            f"Causes, causal concepts:\n\n{results.table(causes)}",
            f"Read-only:\n\n{results.table(read_only)}",
        ]
    )


def columns(one: dict[str, Any]) -> dict[str, Any]:
    """A score as cells of a table."""
    return {
        "precision@1": one["precision_at_1"],
        "MRR": one["mrr"],
        "concepts": one["concepts"],
        "without a right feature": ", ".join(one["without"]) or "none",
        "precision@1 of the rest": shown(one["rest_precision_at_1"]),
        "MRR of the rest": shown(one["rest_mrr"]),
    }


def shown(value: float | None) -> float | str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stories", type=int, default=STORIES, help="fewer: for a quick try")
    parser.add_argument("--json", action="store_true", help="print JSON, leave RESULTS.md alone")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder) / "run", seed, arguments.stories))
    if arguments.json:
        print(json.dumps({"seeds": rows}))
    else:
        results.write_section(TITLE, report(rows))
        print(report(rows))


if __name__ == "__main__":
    main()
