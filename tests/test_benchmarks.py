"""benchmarks/: the scripts run at a tiny shape, and what they write stands where it should."""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("results")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "training.py", *arguments],
        capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent,
    )  # fmt: skip


def test_training_prints_what_it_promises() -> None:
    written = BENCHMARKS / "RESULTS.md"
    before = written.read_bytes() if written.exists() else None
    done = run(
        "--json", "--shapes", "16x64x4x128", "--steps", "6", "--rounds", "2", "--threads", "1",
        "--peers", "dense",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["architecture"] for row in found["rows"]] == ["topk", "batchtopk"]
    for row in found["rows"]:
        assert row["shape"] == [16, 64, 4, 128]
        assert row["ratio"] == pytest.approx(row["sae_lens_ms"] / row["ours_ms"])
        assert row["floor_fraction"] == pytest.approx(row["floor_ms"] / row["ours_ms"])
        assert row["floor_ms"] > 0 and set(row["peers"]) == {"dense"} and row["peers"]["dense"] > 0
        assert row["loss_ratio_at_equal_steps"] > 0
        assert row["ev_ours"] < 1 and row["ev_sae_lens"] < 1
        # Nothing is chosen but k latents a row, on average where the batch chooses.
        assert row["l0_ours"] <= 4 or row["architecture"] == "batchtopk"
    others = [(row["architecture"], row["shape"]) for row in found["others"]]
    names = ("standard", "jumprelu", "gated", "matryoshka")
    assert others == [(name, [16, 64, 4, 128]) for name in names]
    assert all(row["ratio"] > 0 for row in found["others"])
    assert (written.read_bytes() if written.exists() else None) == before


@pytest.mark.parametrize("text", ["16x64x65x128", "16x64x4", "16x64x0x128"])
def test_a_shape_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    ours = importlib.import_module("peers.ours")
    assert ours.shape("16x64x4x128") == (16, 64, 4, 128)
    with pytest.raises(argparse.ArgumentTypeError, match="k ≤ d_sae, such as 192x2048x16x4096"):
        ours.shape(text)


def test_losses_that_differ_stop_the_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality = importlib.import_module("peers.quality")
    quality.agree({"ours": [1.0, 3.0], "dense": [1.0005, 9.0], "sae-lens autocast": [1.04]})
    with pytest.raises(SystemExit, match="the first loss of dense"):
        quality.agree({"ours": [1.0], "dense": [1.01]})


def test_sides_run_forwards_and_backwards_in_turn(results: ModuleType) -> None:
    order: list[str] = []
    sides = {name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}
    found = results.alternating(sides, 3, lambda line: None)
    assert order == list("abbaab")
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_quartiles_hold_half_of_the_values(results: ModuleType) -> None:
    assert results.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0)
    assert results.quartiles([7.0]) == (7.0, 7.0)
    low, high = results.quartiles([1.0, 9.0])
    assert low <= statistics.median([1.0, 9.0]) <= high


def test_a_section_replaces_its_own_and_leaves_the_others(
    results: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "RESULTS.md"
    results.write_section("One", "what it was", path)
    results.write_section("Two", "second", path)
    results.write_section("One", "again", path)
    text = path.read_text(encoding="utf-8")
    assert "what it was" not in text
    assert text.index("## One\n\nagain") < text.index("## Two\n\nsecond")
