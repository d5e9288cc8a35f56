"""benchmarks/planted_search.py: its figures and its section, of reports made by hand."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from saesteer.effects.planted import ReadOnly, SearchReport
from saesteer.effects.planted_search import score_search

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("planted_search")


@pytest.fixture
def report() -> SearchReport:
    """The sea is found second, the garden first, and no feature is right for music."""
    right = {"sea": {2}, "garden": {1}, "music": set[int]()}
    fires_on = score_search(lambda _: [1, 2], right.__getitem__, list(right), seed=0)
    none = score_search(lambda _: [1], lambda _: set(), ["sea"], seed=0)
    red = ReadOnly("red", 7, 0.95, True, None, {"match": 1.0, "effect": 0.125})
    return SearchReport(fires_on, {"match": none, "effect": fires_on}, (red,))


def test_concepts_without_a_right_feature_are_told_from_those_not_found(
    benchmark: ModuleType, report: SearchReport
) -> None:
    found = benchmark.figures(report)
    assert found["fires_on"] == {
        "precision_at_1": pytest.approx(1 / 3), "mrr": 0.5, "concepts": 3, "without": ["music"],
        "rest_precision_at_1": 0.5, "rest_mrr": 0.75,
    }  # fmt: skip
    nothing = found["causes"]["match"]
    assert (nothing["without"], nothing["rest_mrr"]) == (["sea"], None)
    assert found["read_only"][0]["mrr"] == {"match": 1.0, "effect": 0.125}
    assert json.loads(json.dumps(found)) == found


def test_the_section_has_a_line_for_each_seed_and_order(
    benchmark: ModuleType, report: SearchReport
) -> None:
    rows = [benchmark.figures(report) | {"seed": seed, "seconds": 1} for seed in (0, 1)]
    lines = benchmark.report(rows).splitlines()
    assert "| 0 | 0.333 | 0.5 | 3 | music | 0.5 | 0.75 |" in lines
    assert "| 1 | match | 0 | 0 | 1 | sea | – | – |" in lines
    assert "| 1 | effect | 0.333 | 0.5 | 3 | music | 0.5 | 0.75 |" in lines
    assert "| 1 | red | 7 | 0.95 | yes | – | 1 | 0.125 |" in lines


def test_json_leaves_the_results_alone(
    benchmark: ModuleType,
    report: SearchReport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def measure(_: Path, seed: int, stories: int) -> dict[str, object]:
        asked.append((seed, stories))
        return benchmark.figures(report) | {"seed": seed}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark.results, "write_section", None)
    monkeypatch.setattr(sys, "argv", ["planted_search.py", "--json", "--seeds", "0", "4"])
    benchmark.main()
    assert [row["seed"] for row in json.loads(capsys.readouterr().out)["seeds"]] == [0, 4]
    assert asked == [(0, benchmark.STORIES), (4, benchmark.STORIES)]
