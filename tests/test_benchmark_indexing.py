"""benchmarks/indexing.py at a tiny size: what it prints, what it compares, when it refuses."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from saesteer.core.model import EMBEDDED, HookPoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
POINT = HookPoint(2, "resid_post")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("indexing")


@pytest.fixture
def task(bench: ModuleType) -> ModuleType:
    return importlib.import_module("peers.indexing_task")


@pytest.fixture
def venvs(bench: ModuleType) -> ModuleType:
    return importlib.import_module("peers.venvs")


@pytest.fixture
def given(bench: ModuleType, task: ModuleType, tmp_path: Path) -> Path:
    """16 features of the embedded model and two contexts."""
    source = bench.planted_text(tmp_path, 512)
    bench.quietly(
        lambda: task.written(tmp_path, EMBEDDED, source, d_sae=16, tokens=256, most_tokens=256)
    )
    return tmp_path


def test_prints_what_it_promises_also_without_the_peer_and_writes_nothing(
    bench: ModuleType,
    venvs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = BENCHMARKS / "RESULTS.md"
    before = written.read_bytes() if written.exists() else None
    for name in ("SAESTEER_TEST_MODEL", "SAESTEER_TEST_TEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(venvs, "INSTALLED", tmp_path)
    arguments = ["--json", "--tokens", "300", "--d-sae", "16", "--rounds", "1", "--no-install"]
    arguments += ["--more", "2", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["indexing.py", *arguments])
    bench.main()
    found = json.loads(capsys.readouterr().out)
    assert found["peer"] == "SAEDashboard"
    assert "not installed" in found["not_run"]["SAEDashboard"]
    for name in ("peer_tok_s", "ratio", "peer_peak_mb", "density_difference"):
        assert found[name] is None
    # Whole contexts of 128.
    assert (found["tokens"], found["d_sae"]) == (256, 16)
    assert found["ours_tok_s"] > 0 and found["index_mb"] > 0
    assert 0 < found["ours_loaded_mb"] <= found["ours_peak_mb"]
    (more,) = found["more"]
    assert more["tokens"] == 512
    assert more["ours_tok_s"] > 0 and more["ours_peak_mb"] > found["ours_loaded_mb"] / 2
    assert found["model"] == EMBEDDED and "a real model" in found["not_run"]
    text = bench.markdown(found, 1)
    assert text.endswith("Not run: a real model (SAESTEER_TEST_MODEL is not set).")
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert (written.read_bytes() if written.exists() else None) == before


def test_the_peer_finds_the_same_densities(
    bench: ModuleType, venvs: ModuleType, given: Path
) -> None:
    try:
        python = venvs.python_of(bench.PEER, install=False)
    except importlib.import_module("peers.apart").NotInstalledError as error:
        pytest.skip(f"{bench.PEER}: {error}")
    programs = {"ours": sys.executable, bench.PEER: python}
    ours, theirs = (bench.run(python, name, given, 256, 1) for name, python in programs.items())
    assert max(ours["density"]) > 0.05
    assert bench.difference(ours["density"], theirs["density"]) <= 1e-5
    assert theirs["version"] == "0.8.0" and theirs["seconds"] > 0
    assert 0 < theirs["loaded_mb"] <= theirs["peak_mb"]


def test_other_densities_are_no_comparison(bench: ModuleType) -> None:
    assert bench.difference([0.5, 0.1], [0.5, 0.100005]) == pytest.approx(5e-6)
    with pytest.raises(SystemExit, match=r"feature 1 has density 0.100000 .* 0.100030 .*not"):
        bench.difference([0.5, 0.1, 0.0], [0.50002, 0.10003, 0.0])
    with pytest.raises(SystemExit, match="feature 0"):
        bench.difference([float("nan")], [0.1])


def test_a_program_that_fails_says_why(bench: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho first >&2\necho the reason >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(bench.FailedError, match=r"^the reason$"):
        bench.run(str(program), "ours", tmp_path, 128, 1)
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(bench.FailedError, match="ended with 3"):
        bench.run(str(program), "ours", tmp_path, 128, 1)


def test_thresholds_stand_in_gaps_and_give_the_densities(task: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 12, generator=generator) + 3
    d_sae = 80  # more than are worked on at once
    sae, l0 = task.sae_on(x, d_sae, POINT, "made up", "0" * 16)
    pre = (x - sae.b_dec).double() @ sae.W_enc.double()
    off = (pre - sae.threshold.double()).abs().min(0).values
    assert float(off.min()) > 1e-5  # rounding of float32 is some 1e-6 here
    codes = sae.encode(x)
    fired = torch.bincount(codes.latents, minlength=d_sae)
    assert torch.equal(fired, (pre > sae.threshold).sum(0))
    assert float(fired.sum()) / len(x) == pytest.approx(l0)
    # Evenly spread by their logarithm from rarest to commonest, each met to an eighth.
    wanted = task.RAREST * (task.COMMONEST / task.RAREST) ** torch.linspace(0, 1, d_sae)
    wanted = (wanted * len(x)).round().clamp_min(1)
    assert torch.all((fired.sort().values - wanted).abs() <= wanted / 8 + 1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(d_sae))
    again, _ = task.sae_on(x, d_sae, POINT, "made up", "0" * 16)
    assert again.hash == sae.hash


def test_no_threshold_parts_what_only_rounding_parts(task: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    alike = torch.randn(300, 12, generator=generator).repeat(4, 1)
    x = alike + 1e-6 * torch.randn(alike.shape, generator=generator)
    sae, _ = task.sae_on(x, 40, POINT, "made up", "0" * 16)
    fired = torch.bincount(sae.encode(x).latents, minlength=40)
    assert torch.all(fired > 0) and torch.all(fired % 4 == 0)
    # Where there is no such gap at all, the widest is taken.
    assert task._gap(torch.zeros(9), 3) in range(8)


def test_a_text_that_is_too_short_is_told(
    bench: ModuleType, task: ModuleType, tmp_path: Path
) -> None:
    source = bench.planted_text(tmp_path, 512)
    with pytest.raises(SystemExit, match=r"expected 1,280,000; set SAESTEER_TEST_TEXT"):
        bench.quietly(
            lambda: task.written(
                tmp_path, EMBEDDED, source, d_sae=8, tokens=128, most_tokens=1_280_000
            )
        )


def test_a_peer_that_cannot_be_had_is_told_with_its_reason(
    venvs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = importlib.import_module("peers.apart").NotInstalledError
    monkeypatch.setattr(venvs, "INSTALLED", tmp_path)
    with pytest.raises(gone, match="not installed"):
        venvs.python_of("saedashboard", install=False)

    def refused(*command: str) -> None:
        raise gone("no such package")

    monkeypatch.setattr(venvs, "_run", refused)
    with pytest.raises(gone, match="no such package"):
        venvs.python_of("saedashboard")


def test_an_environment_is_found_while_its_list_is_the_same(
    venvs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = importlib.import_module("peers.apart").NotInstalledError
    monkeypatch.setattr(venvs, "INSTALLED", tmp_path)
    folder = tmp_path / "saedashboard"
    folder.mkdir()
    listed = (BENCHMARKS / "peers" / "saedashboard.txt").read_text(encoding="utf-8")
    (folder / "installed.txt").write_text(listed, encoding="utf-8")
    python: Any = venvs.python_of("saedashboard", install=False)
    assert Path(python) == folder / "bin" / "python"
    (folder / "installed.txt").write_text("sae-dashboard==0.7\n", encoding="utf-8")
    with pytest.raises(gone, match="not installed"):
        venvs.python_of("saedashboard", install=False)
