"""fitting.sweep: every combination on one pass, each a run of its own, and their table."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer import config, fitting
from saesteer.cli.main import main
from saesteer.config import Config, SweepConfig
from saesteer.core.sae import load_sae
from saesteer.errors import ConfigError, SaesteerError, TrainingError
from saesteer.run import Run
from saesteer.training.stream import CachedStream
from tests.trained import same

ROOT = Path(__file__).parents[1]
SWEEP = SweepConfig(architecture=("topk", "batchtopk"), k=(4, 8))
NAMES = ["topk-k4", "topk-k8", "batchtopk-k4", "batchtopk-k8"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are the same to the bit as in another process, whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_config(small_config: Config) -> Config:
    """16 steps of 512 tokens, 64 features."""
    return dataclasses.replace(
        small_config,
        cache=dataclasses.replace(small_config.cache, tokens=8000, held_out=0.1),
        sae=dataclasses.replace(small_config.sae, d_sae=64),
        train=dataclasses.replace(
            small_config.train, tokens=16 * 512, batch_size=512, log_every=4, products="float32"
        ),
    )


def changed(base: Config, folder: Path, **tables: Any) -> Config:
    """`base` for a run folder of its own, with some tables or their keys changed."""
    new = {
        name: dataclasses.replace(getattr(base, name), **at) if isinstance(at, dict) else at
        for name, at in tables.items()
    }
    return dataclasses.replace(base, run=str(folder), **new)


@pytest.fixture(scope="module")
def swept(
    tiny_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[Run], list[dict[str, Any]]]:
    """A run whose sweep is done and evaluated: read it, don't change it."""
    run = Run.create(changed(tiny_config, tmp_path_factory.mktemp("sweep") / "run", sweep=SWEEP))
    members = fitting.sweep(run)
    return run, members, fitting.evaluate_sweep(run, members)


def test_every_combination_is_trained_on_one_pass(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    batches = CachedStream.batches

    def watched(self: CachedStream, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return batches(self, start, stop)

    monkeypatch.setattr(CachedStream, "batches", watched)
    sweep = SweepConfig(d_sae=(32, 64), lr=(1e-3, 3e-3), seed=(0, 1))
    run = Run.create(changed(tiny_config, tmp_path / "run", sweep=sweep))
    members = fitting.sweep(run)
    assert asked == [(0, 16)]
    assert [member.path.name for member in members] == [
        f"d{d_sae}-lr{lr}-seed{seed}"
        for d_sae in (32, 64)
        for lr in (1e-3, 3e-3)
        for seed in (0, 1)
    ]
    for member in members:
        about = member.config
        assert f"d{about.sae.d_sae}-lr{about.train.lr}-seed{about.train.seed}" == member.path.name
        assert member.sae.d_sae == about.sae.d_sae
        assert config.read(member.path / "config.toml") == about
        lines = (member.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 16]
    assert len({member.sae.hash for member in members}) == 8


@pytest.mark.parametrize("name", NAMES)
def test_a_member_is_the_sae_trained_alone(
    swept: tuple[Run, list[Run], Any], tiny_config: Config, tmp_path: Path, name: str
) -> None:
    run, members, _ = swept
    assert [member.path for member in members] == [run.path / "sweep" / name for name in NAMES]
    member = members[NAMES.index(name)]
    architecture, k = name.split("-k")
    sae = {"architecture": architecture, "k": int(k)}
    alone = Run.create(changed(tiny_config, tmp_path / "run", sae=sae))
    shutil.copytree(run.path / "activations", alone.path / "activations")
    assert same(fitting.train(alone), member.sae)
    assert alone.sae.hash == member.sae.hash


def test_a_seed_changes_the_weights_and_not_the_order(tiny_config: Config, tmp_path: Path) -> None:
    """What is compared saw the same tokens at the same step."""
    run = Run.create(changed(tiny_config, tmp_path / "run", sweep=SweepConfig(seed=(0, 3))))
    first, second = fitting.sweep(run)
    alone = fitting.train(Run.create(changed(tiny_config, tmp_path / "alone")))
    assert same(first.sae, alone)
    assert not torch.equal(first.sae.W_dec, second.sae.W_dec)
    losses = [
        json.loads((each.path / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        for each in (first, second)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_the_table_tells_what_each_is_worth(
    swept: tuple[Run, list[Run], list[dict[str, Any]]],
) -> None:
    run, members, table = swept
    assert json.loads((run.path / "sweep" / "sweep.json").read_text()) == table
    assert [row["name"] for row in table] == NAMES
    for row, member in zip(table, members, strict=True):
        figures = json.loads((member.path / "evaluation.json").read_text())
        assert figures["sae_hash"] == member.sae.hash
        for key in ("l0", "explained_variance", "ce_recovered", "dead_fraction"):
            assert row[key] == figures[key]
        assert (row["architecture"], row["d_sae"]) == (member.config.sae.architecture, 64)
        assert row["l0"] == pytest.approx(member.config.sae.k, rel=0.1)
    values = {row["name"]: row["explained_variance"] for row in table}
    assert values["topk-k8"] > values["topk-k4"]


def test_each_member_is_a_run_that_any_command_takes(
    swept: tuple[Run, list[Run], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run was moved."""
    shutil.copytree(swept[0].path, tmp_path / "moved", symlinks=True)
    folder = tmp_path / "moved" / "sweep" / "batchtopk-k4"
    for line in (
        f"eval {folder} --plots none",
        f"index {folder}",
        f"search {folder} boat",
        f"feature {folder} 3",
        f"steer {folder} --clamp 3=2x --prompt 'Story A. Once' --max-new-tokens 3",
        f"train {folder}",
        f"push {folder} me/sae --dry-run",
    ):
        assert main(shlex.split(line)) == 0, (line, capsys.readouterr().err)
    opened = Run.open(folder)
    assert opened.shards.n_contexts == Run.open(tmp_path / "moved").shards.n_contexts == 125
    cached = tmp_path / "moved" / "activations"
    assert (folder / "activations").resolve() == cached.resolve()
    assert opened.sae.hash == swept[1][2].sae.hash


def test_a_killed_sweep_ends_with_the_same_saes(tiny_config: Config, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "sweep": SweepConfig(architecture=("topk", "jumprelu")),
        "train": {"tokens": 80 * 512, "checkpoint_every": 3},
    }
    config.write(tmp_path / "c.toml", changed(tiny_config, tmp_path / "killed", **how))
    process = subprocess.Popen(
        [sys.executable, "-m", "saesteer", "sweep", str(tmp_path / "c.toml")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    saved = tmp_path / "killed" / "sweep"
    try:
        deadline = time.monotonic() + 120
        while len(list(saved.glob("*/checkpoints/step-*"))) < 3:
            assert process.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    newest = saved / "topk" / "checkpoints" / "step-00000080"
    assert not newest.exists()
    # One of them has lost its newest checkpoint, so that they go on from different steps.
    shutil.rmtree(max((saved / "jumprelu" / "checkpoints").glob("step-*")))
    resumed = fitting.sweep(Run.create(changed(tiny_config, tmp_path / "killed", **how)))
    whole = fitting.sweep(Run.create(changed(tiny_config, tmp_path / "whole", **how)))
    for one, other in zip(resumed, whole, strict=True):
        assert same(one.sae, other.sae)
        logged = [
            [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
            for run in (one, other)
        ]
        assert [line["step"] for line in logged[0]] == list(range(4, 81, 4))
        assert [line["loss"] for line in logged[0]] == [line["loss"] for line in logged[1]]


def test_a_live_sweep_has_no_cache(tiny_config: Config, tmp_path: Path) -> None:
    rows = {"live": True, "buffer": 17}
    made = changed(tiny_config, tmp_path / "run", sweep=SweepConfig(k=(4, 8)), rows=rows)
    run = Run.create(made)
    members = fitting.sweep(run)
    table = fitting.evaluate_sweep(run, members)
    assert not list((tmp_path / "run").rglob("activations"))
    assert [row["name"] for row in table] == ["k4", "k8"]
    alone = fitting.train(Run.create(changed(tiny_config, tmp_path / "a", rows=rows, sae={"k": 8})))
    assert same(alone, members[1].sae)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (SweepConfig(), "no [sweep]"),
        (SweepConfig(architecture=("topk", "tpok")), "did you mean 'topk'"),
        (SweepConfig(k=(8, 65)), "k is 65"),
        (SweepConfig(d_sae=(64, 0)), "sae.d_sae is 0"),
        (SweepConfig(lr=(1e-3, float("nan"))), "train.lr is nan"),
        (SweepConfig(seed=(0, -1)), "train.seed is -1"),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_is_cached(
    tiny_config: Config, tmp_path: Path, sweep: SweepConfig, message: str
) -> None:
    with pytest.raises(SaesteerError) as raised:
        fitting.sweep(Run.create(changed(tiny_config, tmp_path / "run", sweep=sweep)))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert isinstance(raised.value, ConfigError | TrainingError)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.toml"}


def test_the_command_prints_the_table(
    swept: tuple[Run, list[Run], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(swept[0].path, tmp_path / "run", symlinks=True)
    assert main(["sweep", str(tmp_path / "run"), "--sweep.architecture", "topk"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith(tuple(NAMES))]
    assert [line[0] for line in lines] == ["topk-k4", "topk-k8"]
    shown = [float(line[1]) for line in lines]
    assert shown == sorted(shown)  # by L0
    expected = {row["name"]: row["explained_variance"] for row in swept[2]}
    for name, _, explained, *_ in lines:
        assert float(explained) == pytest.approx(expected[name], abs=1e-4)
    assert max(map(len, out.splitlines()[:3])) <= 80
    assert (tmp_path / "run/sweep/pareto.svg").exists() or "no plot" in out
    assert load_sae(tmp_path / "run/sweep/topk-k8/sae").hash == swept[1][1].sae.hash
    # Without a [sweep] it is one line.
    assert main(["sweep", str(tmp_path / "run/sweep/topk-k8")]) == 2
    assert "no [sweep]" in capsys.readouterr().err


def test_a_sweep_over_what_the_architecture_has_no_use_for_is_refused(tiny_config: Config) -> None:
    base = dataclasses.replace(
        tiny_config,
        sae=dataclasses.replace(tiny_config.sae, architecture="jumprelu"),
        sweep=SweepConfig(k=(4, 8)),
    )
    with pytest.raises(ConfigError, match="varies nothing that jumprelu uses"):
        fitting.combinations(base)
    both = dataclasses.replace(base, sweep=SweepConfig(architecture=("topk", "gated"), k=(4, 8)))
    assert list(fitting.combinations(both)) == ["topk-k4", "topk-k8", "gated"]


def test_members_of_a_seed_sweep_keep_the_order_of_their_tokens(tiny_config: Config) -> None:
    base = dataclasses.replace(tiny_config, sweep=SweepConfig(seed=(3, 4)))
    members = fitting.combinations(base)
    assert list(members) == ["seed3", "seed4"]
    assert {member.train.order_seed for member in members.values()} == {tiny_config.train.seed}
