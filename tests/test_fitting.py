"""fitting.train: what the configuration says is what is trained, from a cache or without one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer import config, fitting, run_text, stages
from saesteer.config import Config
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.sae import load_sae
from saesteer.core.shards import Shards
from saesteer.errors import SaesteerError
from saesteer.run import Run
from saesteer.training.stream import Batch
from saesteer.training.trainer import Trainer
from tests.trained import same

ROOT = Path(__file__).parents[1]
SIZE = 64  # tokens a context


@pytest.fixture(scope="module")
def tiny_config(small_config: Config) -> Config:
    """A quarter of a second's training: 16 steps of 512 tokens, 64 features."""
    return dataclasses.replace(
        small_config,
        cache=dataclasses.replace(small_config.cache, tokens=8000, held_out=0.1),
        sae=dataclasses.replace(small_config.sae, architecture="batchtopk", d_sae=64, k=6),
        train=dataclasses.replace(
            small_config.train, tokens=16 * 512, batch_size=512, log_every=4, products="float32"
        ),
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are the same to the bit as in another process, whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(base: Config, folder: Path, **tables: dict[str, Any]) -> Config:
    """`base` for a run folder of its own, with some keys changed."""
    new = {name: dataclasses.replace(getattr(base, name), **at) for name, at in tables.items()}
    return dataclasses.replace(base, run=str(folder), **new)


def trained(base: Config, folder: Path, **tables: dict[str, Any]) -> Run:
    run = Run.create(changed(base, folder, **tables))
    assert fitting.train(run) is not None
    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that are trained on from here on."""
    found: list[Batch] = []
    step = Trainer.step

    def watched(self: Trainer, batch: Batch) -> dict[str, float]:
        found.append(batch)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", watched)
    return found


def rows(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.x for batch in batches])


# --- what is trained on --------------------------------------------------------------------------


def test_a_transcoder_predicts_the_output_of_an_mlp(
    tiny_config: Config, tmp_path: Path, seen: list[Batch]
) -> None:
    run = trained(
        tiny_config,
        tmp_path / "run",
        cache={"hook_point": "layers.1.resid_pre"},
        sae={"hook_point_out": "layers.1.mlp_out", "skip": True},
        train={"tokens": 100 * 512},
    )
    sae = load_sae(run.path / "sae")
    assert sae.hook_point == HookPoint(1, "resid_pre")
    assert sae.hook_point_out == HookPoint(1, "mlp_out")
    assert sae.W_skip is not None and float(sae.W_skip.abs().max()) > 0
    # Input and target are the two points' activations of the same tokens.
    shards = Shards(run.path / "activations"), Shards(run.path / "activations/layers.1.mlp_out")
    everything = [each.rows(np.arange(each.n_contexts * SIZE)) for each in shards]
    batch = seen[3]
    at = torch.cdist(batch.x, everything[0]).argmin(1)
    assert torch.equal(everything[0][at], batch.x)
    assert torch.equal(everything[1][at], batch.target)
    # The figure of the evaluation, made by hand.
    tokens = torch.from_numpy(np.array(shards[0].tokens[-7:])).long()  # half of 10% of 125
    points = [sae.hook_point, sae.hook_point_out]
    found = activations(run.model, points, tokens)
    plain = ~np.isin(tokens.numpy(), sorted(run.special_ids)).reshape(-1)
    x, target = (found[point].flatten(0, 1)[torch.from_numpy(plain)] for point in points)
    error = target - sae.decode(sae.encode(x), x)
    by_hand = 1 - float(error.square().sum() / (target - target.mean(0)).square().sum())
    figures = stages.evaluate(run)
    assert figures["explained_variance"] == pytest.approx(by_hand, abs=1e-4)
    assert by_hand > 0.5


def test_special_tokens_are_trained_on_only_where_asked(
    tiny_config: Config, tmp_path: Path, seen: list[Batch]
) -> None:
    counts = []
    for name, asked in (("without", False), ("with", True)):
        seen.clear()
        run = trained(tiny_config, tmp_path / name, rows={"special_tokens": asked})
        bos = run.shards.rows(np.array([0]))
        counts.append(int((rows(seen) - bos).norm(dim=1).lt(1e-4).sum()))
    assert counts[0] == 0
    # A context of 64 begins with one, so about 1 in 64 of 8192 rows.
    assert 60 < counts[1] < 200


def test_tokens_of_a_large_norm_are_left_out(
    tiny_config: Config, tmp_path: Path, seen: list[Batch]
) -> None:
    highest = []
    for name, most in (("all", None), ("few", 1.1)):
        seen.clear()
        run = trained(tiny_config, tmp_path / name, rows={"max_norm": most})
        highest.append(float(rows(seen).norm(dim=1).max()) / run.shards.statistics.median_norm)
    assert highest[0] > 1.15
    assert highest[1] < 1.11


def test_more_hook_points_are_cached_in_the_same_pass(tiny_config: Config, tmp_path: Path) -> None:
    also = ("layers.0.attn_out", "layers.2.resid_post")
    run = trained(tiny_config, tmp_path / "run", cache={"also": also})
    first = run.shards
    tokens = torch.from_numpy(np.array(first.tokens[7:9])).long()
    points = [HookPoint.parse(name) for name in also]
    expected = activations(run.model, points, tokens)
    for point in points:
        other = Shards(run.path / "activations" / str(point))
        assert np.array_equal(other.tokens, first.tokens)
        found = other.rows(np.arange(7 * SIZE, 9 * SIZE)).view(2, SIZE, -1)
        torch.testing.assert_close(found, expected[point], atol=1e-4, rtol=1e-4)
    # They change nothing about what is trained.
    assert same(run.sae, trained(tiny_config, tmp_path / "plain").sae)


def test_by_rows_or_by_features_is_the_same_to_one_process(
    tiny_config: Config, tmp_path: Path
) -> None:
    saes = [
        trained(tiny_config, tmp_path / share, train={"share": share}).sae
        for share in ("rows", "features")
    ]
    assert same(*saes)


# --- without a cache -----------------------------------------------------------------------------

LIVE: dict[str, dict[str, Any]] = {"rows": {"live": True, "buffer": 17}}


def nearest(some: Tensor, everything: Tensor) -> Tensor:
    return torch.cdist(some, everything, compute_mode="donot_use_mm_for_euclid_dist").min(1).values


def test_a_live_run_trains_and_evaluates_without_a_cache(
    tiny_config: Config, tmp_path: Path, seen: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tiny_config, tmp_path / "run", **LIVE, train={"tokens": 60 * 512})
    assert not (run.path / "activations").exists()
    trained_on = rows(seen)
    evaluated: list[Tensor] = []
    evaluate = stages.evaluation.evaluate

    def watched(model: Any, sae: Any, batches: Any, **rest: Any) -> dict[str, Any]:
        evaluated.extend(batch.activations for batch in batches)
        return evaluate(model, sae, batches, **rest)

    monkeypatch.setattr(stages.evaluation, "evaluate", watched)
    figures = stages.evaluate(run)
    assert figures["explained_variance"] > 0.5
    held_out = torch.cat(evaluated)
    assert run_text.live_held_out(run.config) == 13
    assert len(held_out) == 7  # the other six calibrate a threshold
    # Tokens far into a context have been in no other; those that were trained on are found.
    late = held_out[:, 24:].flatten(0, 1)
    assert float(nearest(late, trained_on).min()) > 1e-2
    from_training = run_text.batches(run, None, 40 * SIZE, held_out=False)
    later = torch.cat([batch.activations for batch in from_training])[20:, 24:].flatten(0, 1)
    assert float((nearest(later, trained_on) < 1e-3).float().mean()) > 0.8
    index = stages.index(run, tokens=2000)
    assert index.n_features == 64


def test_a_live_run_is_not_evaluated_on_a_cache_from_before(
    tiny_config: Config, tmp_path: Path
) -> None:
    """Whose held-out contexts it was trained on."""
    trained(tiny_config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run = trained(tiny_config, tmp_path / "run", **LIVE)
    tokens = np.concatenate([b.tokens for b in run_text.batches(run, None, 10**9, held_out=True)])
    assert np.array_equal(tokens, run.shards.tokens[6:13])


def test_a_live_transcoder_has_input_and_target_of_the_same_tokens(
    tiny_config: Config, tmp_path: Path, seen: list[Batch]
) -> None:
    run = trained(tiny_config, tmp_path / "run", **LIVE, sae={"hook_point_out": "layers.2.mlp_out"})
    assert load_sae(run.path / "sae").hook_point_out == HookPoint(2, "mlp_out")
    contexts = run_text.batches(run, None, 100 * SIZE, held_out=False)
    tokens = torch.from_numpy(np.concatenate([batch.tokens for batch in contexts])).long()
    points = stages.hook_points(run)
    found = activations(run.model, points, tokens)
    x, target = (found[point].flatten(0, 1) for point in points)
    batch = seen[2]
    at = torch.cdist(batch.x, x).argmin(1)
    there = (batch.x - x[at]).norm(dim=1) < 1e-3
    assert int(there.sum()) > 100
    torch.testing.assert_close(batch.target[there], target[at][there], atol=1e-3, rtol=1e-3)


def test_a_live_run_ended_by_sigkill_ends_with_the_same_bits(
    tiny_config: Config, tmp_path: Path
) -> None:
    how: dict[str, Any] = {**LIVE, "train": {"tokens": 100 * 512, "checkpoint_every": 3}}
    made = tmp_path / "c.toml"
    config.write(made, changed(tiny_config, tmp_path / "killed", **how))
    process = subprocess.Popen(
        [sys.executable, "-m", "saesteer", "train", str(made)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed/checkpoints").glob("step-*"))) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = [int(p.name[5:]) for p in (tmp_path / "killed/checkpoints").glob("step-*")]
    assert max(saved) < 100
    resumed = trained(tiny_config, tmp_path / "killed", **how)
    whole = trained(tiny_config, tmp_path / "whole", **how)
    assert same(resumed.sae, whole.sae)
    logged = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
            for line in (run.path / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (resumed, whole)
    ]
    assert logged[0] == logged[1]


# --- again, and otherwise ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, LIVE], ids=["cached", "live"])
def test_the_same_command_again_does_nothing(
    tiny_config: Config, tmp_path: Path, seen: list[Batch], how: dict[str, Any]
) -> None:
    first = trained(tiny_config, tmp_path / "run", **how)
    stages.evaluate(first, tokens=500)
    stages.index(first, tokens=2000)
    files = [p for p in first.path.rglob("*") if p.is_file() and p.suffix == ".safetensors"]
    before = {p: p.stat().st_mtime_ns for p in files if "sae" not in p.parts}
    seen.clear()
    again = trained(tiny_config, tmp_path / "run", **how)
    assert not seen
    assert same(again.sae, first.sae) and again.sae.hash == first.sae.hash
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # What told of this SAE still does.
    assert (first.path / "evaluation.json").exists()
    assert Run.open(first.path).index.n_features == 64


def test_another_sae_in_its_place_takes_its_index_and_evaluation_away(
    tiny_config: Config, tmp_path: Path
) -> None:
    run = trained(tiny_config, tmp_path / "run")
    stages.evaluate(run, tokens=500)
    stages.index(run)
    shutil.rmtree(run.path / "checkpoints")
    trained(tiny_config, tmp_path / "run", train={"seed": 5})
    assert not (run.path / "evaluation.json").exists()
    assert not (run.path / "features.sqlite").exists()
    assert config.read(run.path / "config.toml").train.seed == 5


def test_figures_go_to_tensorboard_where_asked(tiny_config: Config, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained(tiny_config, tmp_path / "run", train={"log_to": ("tensorboard",)})
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("ev")] == [4, 8, 12, 16]
    assert [event.value for event in events.Scalars("ev")] == pytest.approx(
        [line["ev"] for line in logged], rel=1e-6
    )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"sae": {"architecture": "batchtpok"}}, "did you mean 'batchtopk'"),
        (
            {"sae": {"architecture": "topk", "hook_point_out": "layers.2.mlp_out"}},
            "can't hold a topk transcoder",
        ),
        ({"sae": {"hook_point_out": "layers.9.mlp_out"}}, "layers.9"),
        ({"sae": {"skip": True}}, "only a transcoder"),
        ({"sae": {"architecture": "matryoshka", "widths": (8, 16)}}, "end at d_sae = 64"),
        ({"sae": {"k": 65}}, "k is 65"),
        ({"cache": {"also": ("layers.1.resid_pst",)}}, "resid_pst"),
        ({"cache": {"dtype": "float8"}}, "float8"),
        ({"train": {"products": "float16"}}, "products is 'float16'"),
        ({"train": {"b_dec_init": "zeros"}}, "b_dec_init is 'zeros'"),
        ({"train": {"share": "latents"}}, "'rows' or 'features'"),
        ({"train": {"decay": 1.5}}, "train.decay is 1.5"),
        ({"rows": {"live": True, "max_norm": 3.0}}, "rows.max_norm needs cached"),
        ({"rows": {"live": True, "buffer": 2000}}, "fewer than the 13 to hold out"),
    ],
)
def test_a_bad_value_is_one_line_before_anything_is_cached(
    tiny_config: Config, tmp_path: Path, tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(SaesteerError) as raised:
        trained(tiny_config, tmp_path / "run", **tables)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "run").glob("activations/*.safetensors"))
    assert not (tmp_path / "run" / "sae").exists()


# --- several processes ---------------------------------------------------------------------------

# `python -m saesteer train FILE` for each file, with shards small enough that there are several.
PROGRAM = """
import runpy, sys
from saesteer.training import cache
cache.SHARD_BYTES = 30 * 64 * 64 * 4
for file in sys.argv[1:]:
    sys.argv = ["saesteer", "train", file]
    try:
        runpy.run_module("saesteer", run_name="__main__")
    except SystemExit as left:
        if left.code:
            raise
"""


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_trains_what_one_process_does(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"train": {"log_every": 1}}
    files = []
    for share in ("rows", "features"):
        made = changed(
            tiny_config, tmp_path / share, train={"log_every": 1, "share": share}
        )  # each caches for itself
        config.write(tmp_path / f"{share}.toml", made)
        files.append(str(tmp_path / f"{share}.toml"))
    (tmp_path / "small_shards.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(21000 + os.getpid() % 20000), "-m", "small_shards", *files,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("batchtopk SAE, 64 features") == 2  # one for each file
    assert done.stdout.count("next:") == 2

    monkeypatch.setattr("saesteer.training.cache.SHARD_BYTES", 30 * SIZE * 64 * 4)
    alone = trained(tiny_config, tmp_path / "alone", **how)
    shards = sorted((alone.path / "activations").glob("*.safetensors"))
    assert len(shards) >= 3
    for share in ("rows", "features"):
        together = tmp_path / share
        for path in shards:
            assert (together / "activations" / path.name).read_bytes() == path.read_bytes()
        manifests = [
            json.loads((run / "activations/manifest.json").read_text())
            for run in (together, alone.path)
        ]
        assert manifests[0] == manifests[1]
        assert len(metrics(together)) == len(metrics(alone.path)) == 16
        for one, other in zip(metrics(together), metrics(alone.path), strict=True):
            for key in ("step", "tokens", "loss", "fvu", "ev", "l0", "dead_fraction", "lr"):
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), (share, key)
        sae = load_sae(together / "sae")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            found, expected = getattr(sae, name), getattr(alone.sae, name)
            # Sums come in another order, and Adam makes much of the smallest gradients.
            close = torch.isclose(found, expected, atol=1e-4, rtol=1e-3)
            assert close.double().mean() > 0.98, (share, name)
        assert Run.open(together).sae.hash == sae.hash
        assert not list(together.rglob("*.partial"))
