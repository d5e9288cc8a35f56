"""Searching indexes of 131,072 and 1,048,576 made-up features (--features for others): ms a query.

Every feature has 20 contexts of 32 words (`synthetic_index`). Query words are drawn by frequency:
nearly half of them stand in over half of all features. Phrases are two neighbouring words of a
context. A query is timed from its text to the list of ten hits (`Index.search`); "like" is the
scoring of a text's codes (32 tokens, 64 features on each) against all features' base rates, and the
hits of the best ten. Building is `store.write`, less the time to make the features up. The cold
start is all of `saesteer search RUN WORD`, a new process each time, its files in the page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
import synthetic_index
import torch

from saesteer import config
from saesteer.core.sae_codes import Codes
from saesteer.features import like
from saesteer.features.search import Hit, Index

TITLE = "Search: milliseconds a query"
HITS, WARM, COLD = 10, 3, 5
LIKE_TOKENS, LIKE_FIRING = 32, 64  # of a text: tokens, features that fire on each


def queries(kind: str, n: int) -> Iterator[str]:
    """Queries of one kind; the same ones each time."""
    rng = np.random.default_rng(7)
    words = synthetic_index.vocabulary()
    block = synthetic_index.block(0)
    for _ in range(n):
        if kind == "phrase":
            feature, context = rng.integers(len(block)), rng.integers(synthetic_index.CONTEXTS)
            at = rng.integers(synthetic_index.WORDS - 1)
            pair = block[feature, context, at : at + 2].tolist()
            yield f'"{" ".join(words[i] for i in pair)}"'
        else:
            join = {"term": " ", "and3": " AND ", "or3": " OR "}[kind]
            drawn = synthetic_index.drawn(rng, 1 if kind == "term" else 3).tolist()
            yield join.join(words[i] for i in drawn)


def timed(asked: Callable[[Any], Any], given: Iterator[Any]) -> dict[str, float]:
    """Median and 95th percentile of the milliseconds a call."""
    took = []
    for one in given:
        begin = time.perf_counter()
        asked(one)
        took.append((time.perf_counter() - begin) * 1e3)
    return {"p50_ms": float(np.percentile(took, 50)), "p95_ms": float(np.percentile(took, 95))}


def cold(run: Path, rounds: int) -> float:
    """Median seconds of `saesteer search` in a process of its own."""
    took = []
    for query in queries("term", rounds):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "saesteer", "search", str(run), query],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def texts(n_features: int, n: int) -> Iterator[Codes]:
    """Codes of texts: on every token the same number of features drawn at random."""
    rng = np.random.default_rng(9)
    for _ in range(n):
        latents = np.concatenate(
            [np.sort(rng.choice(n_features, LIKE_FIRING, False)) for _ in range(LIKE_TOKENS)]
        )
        rows = np.repeat(np.arange(LIKE_TOKENS), LIKE_FIRING)
        values = rng.exponential(1.0, len(rows)).astype(np.float32)
        tensors = (torch.from_numpy(array) for array in (rows, latents, values))
        yield Codes(*tensors, n_rows=LIKE_TOKENS)


def alike(index: Index, codes: Codes) -> list[Hit]:
    """What `saesteer search --like` does once it has the text's codes."""
    found = like.by_example(
        codes,
        density=index.column("density"),
        max_act=index.column("max_act"),
        n_tokens=index.meta["n_tokens"],
        limit=HITS,
    )
    return index.hits([(one.feature, one.score, "") for one in found])


def measure(n_features: int, n_queries: int, folder: Path) -> dict[str, Any]:
    """Build an index of so many features in a folder, and search it."""
    path = folder / "features.sqlite"
    seconds = synthetic_index.write(path, n_features)
    config.write(folder / "config.toml", config.Config(run=str(folder)))
    build = {"features": n_features, "build_s": seconds, "size_mb": path.stat().st_size / 1e6}
    print(f"built: {build}", file=sys.stderr)
    rows = []
    with Index.open(path) as index:

        def row(
            kind: str, asked: Callable[[Any], Any], some: Callable[[int], Iterator[Any]]
        ) -> None:
            timed(asked, some(WARM))
            rows.append({"features": n_features, "query": kind, **timed(asked, some(n_queries))})
            print(rows[-1], file=sys.stderr)

        for kind in ("term", "and3", "or3", "phrase"):
            row(kind, lambda query: index.search(query, HITS), partial(queries, kind))
        row("like", partial(alike, index), partial(texts, n_features))
    return {"rows": rows, "builds": [build], "cli_cold_s": cold(folder, COLD)}


def report(found: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    builds = ", ".join(
        f"{b['features']:,} features in {b['build_s']:.0f} s, {b['size_mb']:,.0f} MB"
        for b in found["builds"]
    )
    return "\n\n".join(
        [
            f"`python benchmarks/search.py`. {results.machine('numpy')}",
            " ".join(__doc__.split("\n\n")[1].split()),
            results.table(found["rows"]),
            f"Built: {builds}. `saesteer search` from a cold start: {found['cli_cold_s']:.2f} s "
            f"(with {found['builds'][-1]['features']:,} features).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--folder", type=Path, help="where the index is made (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON, leave RESULTS.md alone")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"rows": [], "builds": []}
    for n_features in sorted(arguments.features):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            one = measure(n_features, arguments.queries, Path(folder))
        found["rows"] += one["rows"]
        found["builds"] += one["builds"]
        # Of the largest.
        found["cli_cold_s"] = one["cli_cold_s"]
    if arguments.json:
        print(json.dumps(found))
    else:
        results.write_section(TITLE, report(found))
        print(report(found))


if __name__ == "__main__":
    main()
