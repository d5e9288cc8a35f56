"""benchmarks/search.py: it runs at a tiny size and prints what it promises."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_search_prints_what_it_promises() -> None:
    written = BENCHMARKS / "RESULTS.md"
    before = written.read_bytes() if written.exists() else None
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "search.py", "--json", "--features", "96", "64",
         "--queries", "3"],
        capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = ["term", "and3", "or3", "phrase", "like"]
    assert [(row["features"], row["query"]) for row in found["rows"]] == [
        (n, kind) for n in (64, 96) for kind in kinds
    ]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in found["rows"])
    assert [build["features"] for build in found["builds"]] == [64, 96]
    assert all(build["build_s"] > 0 and build["size_mb"] > 0 for build in found["builds"])
    assert found["cli_cold_s"] > 0
    assert (written.read_bytes() if written.exists() else None) == before
