"""training/: SAEs that are what they say, and exact resume."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer.core.sae import load_sae
from saesteer.errors import TrainingError
from saesteer.training import checkpoints as checkpoints_module
from saesteer.training.architectures import ARCHITECTURES, Weights
from saesteer.training.rows import batches
from saesteer.training.settings import Settings
from saesteer.training.trainer import Trainer, _rise_and_fall
from tests.trained import (
    BATCH,
    D_SAE,
    HELD_OUT,
    IDENTITY,
    TRAIN,
    InMemory,
    K,
    Squared,
    explained,
    same,
    stream,
    train,
)

# Weights of the penalty with which few latents fire, and little is lost.
SPARSITY = {"standard": 0.25, "gated": 0.3, "jumprelu": 0.01}
TRANSCODERS = ["standard", "jumprelu", "batchtopk", "matryoshka"]


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_training_learns_and_the_sae_takes_raw_activations(architecture: str) -> None:
    data = InMemory()
    sae = train(data, architecture=architecture, steps=400, sparsity=SPARSITY.get(architecture))
    x = data.x[HELD_OUT]
    assert explained(sae, x) > 0.8
    assert sae.conventions.normalize_activations == "none"
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    l0 = len(sae.encode(x).values) / len(x)
    if architecture == "topk":
        assert (sae.architecture, sae.k) == ("topk", K)
        assert l0 <= K
    elif ARCHITECTURES[architecture].chooses:
        assert sae.architecture == "jumprelu"
        assert abs(l0 - K) <= 0.02 * K
    else:
        assert sae.architecture == architecture
        assert 1 < l0 < D_SAE / 4


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_predicts_what_is_at_its_output(architecture: str, skip: bool) -> None:
    data, target = InMemory(), Squared()
    sae = train(
        data, architecture=architecture, steps=400, transcoder=True, skip=skip,
        sparsity=SPARSITY.get(architecture), k=8,
    )  # fmt: skip
    assert sae.hook_point_out is not None and (sae.W_skip is not None) == skip
    assert explained(sae, data.x[HELD_OUT], target.x[HELD_OUT]) > 0.6


def test_matryoshkas_first_latents_are_a_dictionary_of_their_own() -> None:
    """A prefix of a nested dictionary explains more than one of a plain dictionary."""
    x = InMemory().x[HELD_OUT]
    left = {}
    for architecture in ("matryoshka", "batchtopk"):
        sae = train(architecture=architecture, steps=400, widths=(12, D_SAE) * (
            architecture == "matryoshka"
        ))  # fmt: skip
        codes = sae.encode(x).dense(D_SAE)
        part = codes[:, :12] @ sae.W_dec[:12] + sae.b_dec
        left[architecture] = float((x - part).square().sum())
    assert left["matryoshka"] < 0.8 * left["batchtopk"]


def test_jumprelu_thresholds_learn() -> None:
    """They spread from where they start, all but the few of latents that never fire."""
    data = InMemory()
    sae = train(data, architecture="jumprelu", steps=400, sparsity=0.01)
    assert sae.threshold is not None
    scale = 4 / float(data.x[TRAIN].norm(dim=-1).mean())
    assert float((sae.threshold * scale - 0.1).abs().median()) > 0.05
    assert (sae.threshold >= 0).all()


def test_a_higher_sparsity_fires_less() -> None:
    x = InMemory().x[HELD_OUT]
    for architecture, weight in SPARSITY.items():
        l0 = [
            len(train(architecture=architecture, steps=300, sparsity=s).encode(x).values)
            for s in (weight / 4, weight * 2)
        ]
        assert l0[1] < 0.7 * l0[0], architecture


@pytest.mark.parametrize("steps", [3, 50])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_a_short_run_still_saves_the_right_threshold(architecture: str, steps: int) -> None:
    """Where a moving average from zero would be far off."""
    data = InMemory()
    sae = train(data, architecture=architecture, steps=steps)
    x = data.x[HELD_OUT]
    assert abs(len(sae.encode(x).values) / len(x) - K) <= 0.02 * K


def test_the_folded_sae_reconstructs_what_training_did(tmp_path: Path) -> None:
    """The last logged batch's error, from weights at learning rate 0."""
    data = InMemory()
    rows = next(batches(TRAIN, BATCH, 0, 0, 1))[1]
    sae = train(data, steps=1, lr=0.0, folder=tmp_path)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text())
    x = data.x[rows]
    error = x - sae.decode(sae.encode(x), x)
    middle = data.x[TRAIN] - data.x[TRAIN].mean(0)
    fvu = error.square().sum(-1).mean() / middle.square().sum(-1).mean()
    assert float(fvu) == pytest.approx(logged["fvu"], rel=1e-4)


def test_products_in_bfloat16_cost_no_quality() -> None:
    x = InMemory().x[HELD_OUT]
    for architecture in ARCHITECTURES:
        exact, rounded = (
            explained(train(architecture=architecture, steps=300, products=name), x)
            for name in ("float32", "bfloat16")
        )
        assert rounded > exact - 0.02, architecture


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_fitted_encoder_starts_with_less_error(architecture: str) -> None:
    given = stream()
    fvu = {}
    for name in ("fitted", "unit"):
        settings = Settings(architecture=architecture, d_sae=D_SAE, k=8, encoder_init=name)
        trainer = Trainer(settings, given, steps=9, identity=IDENTITY)
        fvu[name] = trainer.step(next(given.batches(0, 1))[1])["fvu"]
    assert fvu["fitted"] < 0.9 * fvu["unit"]


def test_dead_latents_are_revived_by_the_aux_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    initial = Trainer._initial

    def mostly_dead(self: Trainer, x: Tensor, target: Tensor) -> Weights:
        weights = initial(self, x, target)
        weights["b_enc"][8:] = -3.0  # too low to be among the k, not too low to be reached
        return weights

    monkeypatch.setattr(Trainer, "_initial", mostly_dead)

    def alive(aux_coefficient: float) -> int:
        data = InMemory()
        sae = train(
            data, steps=400, aux_coefficient=aux_coefficient, dead_after=640, encoder_init="unit"
        )
        return len(sae.encode(data.x).latents.unique())

    assert alive(1 / 32) > alive(0.0) + 2


def test_geometric_median_is_less_moved_by_outliers_than_the_mean() -> None:
    data = InMemory()
    data.x[::100] += 1e4
    middles = {
        name: train(data, steps=1, lr=0.0, b_dec_init=name).b_dec
        for name in ("mean", "geometric_median")
    }
    middle = data.x.median(0).values
    assert (middles["geometric_median"] - middle).norm() < 5
    assert (middles["mean"] - middle).norm() > 100


def test_learning_rate_rises_stays_and_falls() -> None:
    about = Settings(warm_up=0.1, decay=0.2)
    rates = [_rise_and_fall(step, 100, about) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:80] == [1.0] * 70
    assert rates[-1] == pytest.approx(1 / 20)
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[80:]) < 0)


def test_metrics_are_one_json_object_a_logged_step(tmp_path: Path) -> None:
    train(folder=tmp_path, steps=23)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 23]
    for line in lines:
        assert set(line) == {
            "step", "tokens", "loss", "fvu", "ev", "penalty", "aux", "l0", "dead_fraction", "lr",
            "tokens_per_s", "seconds",
        }  # fmt: skip
        assert line["tokens"] == line["step"] * BATCH
        assert line["l0"] == K
        assert all(math.isfinite(value) for value in line.values())
    assert lines[-1]["ev"] > lines[0]["ev"]


@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
@pytest.mark.parametrize("transcoder", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_saved_saes_load_in_sae_lens_and_encode_identically(
    architecture: str, transcoder: bool, tmp_path: Path
) -> None:
    from sae_lens import SAE

    if transcoder and architecture not in TRANSCODERS:
        with pytest.raises(TrainingError, match=f"can't hold a {architecture} transcoder"):
            train(architecture=architecture, transcoder=True)
        return
    data = InMemory()
    sae = train(data, architecture=architecture, transcoder=transcoder, skip=transcoder)
    sae.save(tmp_path / "sae")
    oracle = SAE.load_from_disk(tmp_path / "sae")
    expected = oracle.encode(data.x)
    codes = sae.encode(data.x)
    torch.testing.assert_close(codes.dense(D_SAE), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes, data.x), oracle(data.x), atol=1e-5, rtol=1e-5)
    loaded = load_sae(tmp_path / "sae")
    assert loaded.hash == sae.hash
    assert loaded.model_fingerprint == IDENTITY["model_fingerprint"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "topkk"}, r"did you mean 'topk'"),
        ({"k": 0}, "k is 0"),
        ({"k": D_SAE + 1}, "k is 49"),
        ({"batch_size": 5000}, "fewer than one batch"),
        ({"b_dec_init": "zero"}, "b_dec_init"),
        ({"decay": 2.0}, "decay is 2"),
        ({"products": "float8"}, "products is 'float8'"),
        ({"architecture": "matryoshka", "widths": (20, 10, D_SAE)}, "they must rise"),
        ({"architecture": "matryoshka", "widths": (10, 20)}, "end at d_sae = 48"),
        ({"skip": True}, "only a transcoder"),
        ({"sparsity": -5.0}, "sparsity is -5"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"dead_after": -3}, "dead_after is -3"),
        ({"encoder_init": "zero"}, "encoder_init is 'zero'"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingError, match=named):
        train(**changes)


def test_nan_activations_and_a_diverging_loss_say_where_and_what_to_try(tmp_path: Path) -> None:
    data = InMemory()
    data.x[0, 3] = math.nan
    with pytest.raises(TrainingError, match=r"1 of 2600 activations before the first step.*float"):
        train(data)

    class Late(InMemory):
        def rows(self, indices: np.ndarray) -> Tensor:
            x = super().rows(indices)
            return x * math.inf if len(self.asked) == 4 else x

    for architecture in ARCHITECTURES:
        with pytest.raises(TrainingError, match="in the batch of step 3 hold NaN"):
            train(Late(), architecture=architecture)
        with pytest.raises(TrainingError, match=r"loss is .* at step \d+ of 60: .*try a lower"):
            train(architecture=architecture, lr=1e25)
    with pytest.raises(TrainingError, match=r"last good checkpoint: step 1 in .*checkpoints"):
        train(Late(), folder=tmp_path, checkpoint_steps=1)
    data.x = torch.zeros_like(data.x)
    with pytest.raises(TrainingError, match="every activation is zero"):
        train(data)


# --- resume --------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    """Stands for a power cut."""


class Dying(InMemory):
    """Raises when it has been asked for rows `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def rows(self, indices: np.ndarray) -> Tensor:
        if len(self.asked) >= self.times:
            raise Killed
        return super().rows(indices)


def steps_logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_killed_run_ends_with_the_same_weights(architecture: str, tmp_path: Path) -> None:
    # More than one epoch, with dead latents, and death between two checkpoints, twice.
    how: dict[str, Any] = {
        "architecture": architecture, "dead_after": 500, "d_sae": 128, "checkpoint_steps": 8,
        "sparsity": SPARSITY.get(architecture), "products": "bfloat16",
    }  # fmt: skip
    unbroken = train(folder=tmp_path / "whole", **how)
    for times in (24, 29):
        with pytest.raises(Killed):
            train(Dying(times), folder=tmp_path / "broken", **how)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 47, "to')  # killed while writing
    data = InMemory()
    resumed = train(data, folder=tmp_path / "broken", **how)
    assert len(data.asked) < 40  # it did go on, rather than start again
    assert same(resumed, unbroken)
    assert steps_logged(metrics) == steps_logged(tmp_path / "whole" / "metrics.jsonl")
    names = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert names == ["step-00000056", "step-00000060"]
    # Once more: nothing is left to do.
    data = InMemory()
    assert same(train(data, folder=tmp_path / "broken", **how), unbroken)
    assert len(data.asked) <= 8


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"folder": tmp_path, "checkpoint_steps": 8}
    unbroken = train()
    with pytest.raises(Killed):
        train(Dying(40), **how)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    whole = (newest / "state.safetensors").read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for name, content in (
        ("state.safetensors", flipped), ("state.safetensors", b"half"), ("state.json", b"{"),
    ):  # fmt: skip
        (newest / name).write_bytes(content)
        with pytest.raises(Killed):
            train(Dying(1), **how)
        assert "is damaged" in capsys.readouterr().out
    assert same(train(**how), unbroken)


def test_a_damaged_last_checkpoint_is_replaced(tmp_path: Path) -> None:
    how: dict[str, Any] = {"folder": tmp_path, "checkpoint_steps": 8}
    unbroken = train(**how)
    last = tmp_path / "checkpoints" / "step-00000060" / "state.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert same(train(**how), unbroken)
    assert last.read_bytes() == whole


def test_a_checkpoint_is_good_only_when_a_loss_came_after_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step 2 of 60.*last good checkpoint: none"):
        train(folder=tmp_path, lr=1e25, checkpoint_steps=1)
    assert (tmp_path / "checkpoints" / "step-00000001").exists()


def test_checkpoints_of_processes_that_shared_the_latents_are_refused(tmp_path: Path) -> None:
    train(folder=tmp_path, by_features=True)
    with pytest.raises(TrainingError, match="made by 1 processes that shared the features"):
        train(folder=tmp_path)
    train(folder=tmp_path / "whole")
    with pytest.raises(TrainingError, match="made with whole SAEs"):
        train(folder=tmp_path / "whole", by_features=True)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    how: dict[str, Any] = {"folder": tmp_path, "checkpoint_steps": 8}
    with pytest.raises(Killed):
        train(Dying(20), **how)
    with pytest.raises(TrainingError, match=r"k=4 \(now 5\), lr=0.003 \(now 0.001\)") as raised:
        train(k=5, lr=1e-3, **how)
    assert "\n" not in str(raised.value)
    with pytest.raises(TrainingError, match="activations="):
        train(InMemory(seed=1), **how)


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"folder": tmp_path, "checkpoint_steps": 8}
    with monkeypatch.context() as patch:
        real, calls = checkpoints_module.save, iter(range(9))

        def sometimes_full(*args: Any) -> bytes:
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            return real(*args)

        patch.setattr(checkpoints_module, "save", sometimes_full)
        with pytest.raises(TrainingError, match=r"No space left.*goes on"):
            train(**how)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000016",
    ]
    assert same(train(**how), train())


PROGRAM = """
import sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.trained import InMemory, train

class Slow(InMemory):
    def rows(self, indices):
        time.sleep(0.02)
        return super().rows(indices)

train(Slow(), folder=Path(sys.argv[1]), checkpoint_steps=3, steps=300)
"""


def test_a_run_ended_by_sigkill_ends_with_the_same_weights(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "checkpoints").glob("step-*"))) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(steps=300)
        data = InMemory()
        resumed = train(data, steps=300, checkpoint_steps=3, folder=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert len(data.asked) < 300
    assert same(resumed, whole)
    assert steps_logged(tmp_path / "metrics.jsonl") == list(range(5, 301, 5))


def test_many_saes_on_one_stream_are_those_trained_alone() -> None:
    from saesteer.training.loop import Job, fit

    data = InMemory()
    given = stream(data)
    settings = [
        Settings(architecture="topk", d_sae=D_SAE, k=k, lr=3e-3, seed=seed)
        for k, seed in ((2, 0), (4, 0), (4, 1))
    ]
    jobs = [Job(Trainer(each, given, steps=60, identity=IDENTITY)) for each in settings]
    asked = len(data.asked)
    together = fit(given, jobs, steps=60)
    assert len(data.asked) - asked == 60  # one pass, whatever the number of SAEs
    assert same(together[1], train(k=4))
    assert same(together[0], train(k=2))
    assert not same(together[1], together[2])
