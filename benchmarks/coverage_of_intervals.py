"""How often the intervals of a comparison hold the truth, and how often its tests cry wolf.

Data sets are planted: concepts scatter around 0 with a standard deviation of 1, and 20 prompts
within each around its concept. "noisy prompts": normal, with a standard deviation of 2 within
concepts; "sure prompts": of .2, so that nearly all chance lies in the concepts; "skewed": concepts
are exponential, less their mean, prompts normal with 1. An interval of 95% should hold 0 in 95% of
the data sets. Families: four arms on 16 concepts against one, without any true difference, p
adjusted by Holm; in 5% or less of the families one of the four should come out below .05.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import results

from saesteer.compare.statistics import Method, bootstrap, holm, paired

TITLE = "Coverage of the intervals"
CONCEPTS = (3, 8, 10, 16, 30)
KINDS = {"noisy prompts": 2.0, "sure prompts": 0.2, "skewed": 1.0}
METHODS: tuple[Method, ...] = ("percentile", "t")
PROMPTS = 20


def planted(concepts: int, kind: str, seed: int) -> np.ndarray:
    """Values [concepts · 20] with a true mean of 0, concept by concept."""
    rng = np.random.default_rng([seed, concepts])
    each = rng.exponential(size=concepts) - 1 if kind == "skewed" else rng.normal(size=concepts)
    return np.repeat(each, PROMPTS) + KINDS[kind] * rng.normal(size=concepts * PROMPTS)


def coverage(concepts: int, kind: str, method: Method, sets: int, resamples: int) -> float:
    """Share of the data sets whose 95% interval holds 0."""
    which, hits = np.repeat(np.arange(concepts), PROMPTS), 0
    for seed in range(sets):
        values = planted(concepts, kind, seed)
        found = bootstrap(values, which, seed=seed, resamples=resamples, method=method)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    return hits / sets


def wolf(method: Method, sets: int, resamples: int) -> float:
    """Share of the families under the null in which Holm's adjusted p falls below .05."""
    which, wrong = np.repeat(np.arange(16), PROMPTS), 0
    for seed in range(sets):
        arms = [planted(16, "noisy prompts", 5 * seed + i) for i in range(5)]
        ps = [
            paired(arm, arms[0], which, seed=seed, resamples=resamples, method=method).p
            for arm in arms[1:]
        ]
        wrong += bool((holm(ps) <= 0.05).any())
    return wrong / sets


def measure(sets: int, resamples: int) -> dict[str, Any]:
    """Coverage by concepts, kind of data and method; family-wise errors by method."""
    rows = []
    for concepts in CONCEPTS:
        for kind in KINDS:
            row: dict[str, Any] = {"concepts": concepts, "data": kind}
            for method in METHODS:
                row[method] = coverage(concepts, kind, method, sets, resamples)
            rows.append(row)
            print(row, file=sys.stderr)
    return {
        "sets": sets,
        "resamples": resamples,
        "coverage": rows,
        "family_wise": {method: wolf(method, sets, resamples) for method in METHODS},
    }


def report(found: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    error = 100 * (0.05 * 0.95 / found["sets"]) ** 0.5
    wrong = ", ".join(f"{name} {share:.1%}" for name, share in found["family_wise"].items())
    return "\n\n".join(
        [
            f"`python benchmarks/coverage_of_intervals.py`. {results.machine('numpy')}",
            " ".join(__doc__.split("\n\n")[1].split()),
            f"{found['sets']:,} data sets a row, {found['resamples']:,} resamples each; the "
            f'standard error of a share of 95% is {error:.1f} points. Below 6 concepts "t" is '
            "Student's.",
            results.table(found["coverage"]),
            f"Families with a false claim: {wrong}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000, help="data sets a row")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print JSON, leave RESULTS.md alone")
    arguments = parser.parse_args()
    found = measure(arguments.sets, arguments.resamples)
    if arguments.json:
        print(json.dumps(found))
    else:
        results.write_section(TITLE, report(found))
        print(report(found))


if __name__ == "__main__":
    main()
