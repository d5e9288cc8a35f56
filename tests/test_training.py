"""training/: exact gradients and choices, exact resume, and SAEs that are what they say."""

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
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae, load_sae
from saesteer.errors import TrainingError
from saesteer.training import checkpoints as checkpoints_module
from saesteer.training import loop
from saesteer.training.architectures import (
    ARCHITECTURES,
    Chosen,
    batch_topk,
    calibrated_threshold,
    topk,
)
from saesteer.training.loop import fit
from saesteer.training.rows import batches, first_held_out, split_rows
from saesteer.training.step import Weights, loss_and_gradients

D, D_SAE, K, BATCH = 16, 48, 4, 64
IDENTITY: dict[str, Any] = {
    "hook_point": HookPoint(1, "resid_post"),
    "model_id": "tiny",
    "model_fingerprint": "0123456789abcdef",
    "context_size": 8,
}


class InMemory:
    """Activations made of a few sparse directions far from the origin, with small noise."""

    def __init__(self, n: int = 3000, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(24, D, generator=generator), dim=-1)
        on = (torch.rand(n, 24, generator=generator) < 0.12).float()
        sizes = on * (1 + torch.rand(n, 24, generator=generator)) * 5
        noise = torch.randn(n, D, generator=generator) * 0.05
        self.x = sizes @ directions + 3 * torch.randn(D, generator=generator) + noise
        self.asked: list[np.ndarray] = []

    def rows(self, indices: np.ndarray) -> Tensor:
        self.asked.append(indices)
        return self.x[torch.from_numpy(indices)]


TRAIN, HELD_OUT = np.arange(2600), np.arange(2600, 3000)


def train(data: InMemory | None = None, **changes: Any) -> Sae:
    arguments: dict[str, Any] = {
        "architecture": "topk",
        "d_sae": D_SAE,
        "k": K,
        "steps": 60,
        "batch_size": BATCH,
        "lr": 3e-3,
        "identity": IDENTITY,
        "log_every": 5,
        "checkpoint_seconds": 1e9,
    }
    return fit(data or InMemory(), TRAIN, HELD_OUT, **(arguments | changes))


def random_weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return Weights(normal(D_SAE, D), normal(D_SAE), normal(D_SAE, D), normal(D))


# --- the choice of what fires --------------------------------------------------------------------


def dense(chosen: Chosen, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=chosen.values.dtype).index_put(
        (chosen.rows, chosen.latents), chosen.values
    )


def check_order(chosen: Chosen, n_rows: int) -> None:
    """Rows ascend, and `starts` says where each begins, empty ones too."""
    assert (chosen.rows.diff() >= 0).all()
    counts = torch.bincount(chosen.rows, minlength=n_rows)
    assert torch.equal(chosen.starts, counts.cumsum(0) - counts)
    assert (chosen.values > 0).all()


@given(st.integers(1, 70), st.integers(1, 40), st.data(), st.sampled_from([-2.0, -0.5, 0.0, 1.0]))
@settings(max_examples=150, deadline=None)
def test_choices_are_exact(n_rows: int, d_sae: int, data: st.DataObject, shift: float) -> None:
    k = data.draw(st.integers(1, d_sae))
    generator = torch.Generator().manual_seed(n_rows * 100 + d_sae)
    pre = torch.randn(n_rows, d_sae, generator=generator, dtype=torch.float64) + shift

    chosen = topk(pre, k)
    check_order(chosen, n_rows)
    values, latents = pre.topk(k, dim=-1)
    assert torch.equal(
        dense(chosen, pre.shape), torch.zeros_like(pre).scatter(1, latents, values.relu())
    )

    chosen = batch_topk(pre, k)
    check_order(chosen, n_rows)
    values, places = pre.relu().flatten().topk(k * n_rows)
    expected = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, places, values)
    assert torch.equal(dense(chosen, pre.shape), expected.reshape(pre.shape))


def test_batch_topk_is_exact_where_few_rows_mislead_it() -> None:
    """Rows that the bound is guessed from hold all the large values, or none of them."""
    generator = torch.Generator().manual_seed(0)
    for sampled in (100.0, -100.0):
        pre = torch.randn(256, 32, generator=generator)
        pre[::4] += sampled
        values = pre.relu().flatten().sort(descending=True).values[: 3 * 256]
        chosen = batch_topk(pre, 3)
        torch.testing.assert_close(chosen.values.sort(descending=True).values, values)


def test_batch_topk_takes_no_more_than_its_share_of_equal_values() -> None:
    chosen = batch_topk(torch.ones(8, 10), 2)
    assert len(chosen.values) == 16
    assert chosen.rows.tolist() == [0] * 10 + [1] * 6


@pytest.mark.parametrize("k", [1, 3, 9])
def test_calibrated_threshold_gives_k_on_average(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    # The second batch fires far more than the first, so equal shares of each would be wrong.
    chunks = [
        torch.randn(40, 32, generator=generator),
        torch.randn(24, 32, generator=generator) + 5,
    ]
    threshold = calibrated_threshold(lambda: iter(chunks), k)
    assert sum(int((chunk > threshold).sum()) for chunk in chunks) == k * 64


def test_calibrated_threshold_is_zero_where_too_little_is_positive() -> None:
    assert calibrated_threshold(lambda: iter([-torch.ones(5, 8)]), 2) == 0.0


# --- gradients -----------------------------------------------------------------------------------


def dense_loss(
    weights: Weights, y: Tensor, kind: str, k: int, variance: float, dead: Tensor | None
) -> Tensor:
    """The loss as the papers write it, dense, for autograd."""
    pre = (y - weights.b_dec) @ weights.encoder.T + weights.b_enc
    if kind == "topk":
        values, latents = pre.topk(k, dim=-1)
        code = torch.zeros_like(pre).scatter(1, latents, values.relu())
    else:
        values, places = pre.relu().flatten().topk(k * len(y))
        code = torch.zeros_like(pre).flatten().scatter(0, places, values).reshape(pre.shape)
    error = y - (code @ weights.decoder + weights.b_dec)
    loss = error.square().sum(-1).mean() / variance
    if dead is not None:
        k_aux = D // 2
        values, places = pre[:, dead].topk(min(k_aux, len(dead)), dim=-1)
        code = torch.zeros_like(pre).scatter(1, dead[places], values.relu())
        aux = (error.detach() - code @ weights.decoder).square().sum(-1).mean() / variance
        loss = loss + aux / 32 * min(1, len(dead) / k_aux)
    return loss


@pytest.mark.parametrize("dead", [None, [], [5], list(range(3, 40))], ids=["off", "0", "1", "37"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_gradients_equal_dense_autograd(kind: str, dead: list[int] | None) -> None:
    for seed, shift in enumerate((0.0, -6.0)):  # with the shift, rows fire less than k
        weights = random_weights(seed)
        weights.b_enc.add_(shift)
        y = torch.randn(32, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        latents = None if dead is None else torch.tensor(dead, dtype=torch.long)
        result = loss_and_gradients(
            weights, y, ARCHITECTURES[kind].choose, K, variance=7.0, dead=latents
        )
        for _, tensor in weights.items():
            tensor.requires_grad_()
        expected = dense_loss(weights, y, kind, K, 7.0, latents if dead else None)
        expected.backward()
        torch.testing.assert_close(result.loss, expected.detach(), atol=1e-12, rtol=1e-10)
        for name, tensor in weights.items():
            torch.testing.assert_close(
                getattr(result.gradients, name), tensor.grad, atol=1e-12, rtol=1e-10, msg=name
            )


def test_gradients_in_float32_agree_to_1e_5() -> None:
    weights, y = random_weights(dtype=torch.float32), torch.randn(128, D)
    result = loss_and_gradients(weights, y, topk, K, variance=16.0, dead=torch.arange(9))
    for _, tensor in weights.items():
        tensor.requires_grad_()
    dense_loss(weights, y, "topk", K, 16.0, torch.arange(9)).backward()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            getattr(result.gradients, name), tensor.grad, atol=1e-5, rtol=1e-5
        )


# --- which rows ----------------------------------------------------------------------------------


def test_rows_leave_out_special_tokens_and_hold_out_the_last_contexts() -> None:
    tokens = np.arange(200).reshape(20, 10) % 50 + 4
    tokens[:, 0] = 1
    tokens[3, 5] = 2
    train_rows, held_out = split_rows(tokens, {1, 2}, held_out=0.1)
    assert first_held_out(20, 0.1) == 18
    assert train_rows.max() < 180 <= held_out.min()
    assert len(train_rows) == 18 * 9 - 1
    assert len(held_out) == 2 * 9
    everything = tokens.reshape(-1)
    assert not np.isin(everything[train_rows], [1, 2]).any()
    assert not np.isin(everything[held_out], [1, 2]).any()
    # No special tokens known: nothing is left out.
    assert len(split_rows(tokens, set(), held_out=0.5)[0]) == 100


def test_rows_that_cannot_be_split_are_named() -> None:
    with pytest.raises(TrainingError, match="only 1 context"):
        split_rows(np.ones((1, 8), dtype=np.int32), set())
    with pytest.raises(TrainingError, match="every cached token is a special token"):
        split_rows(np.ones((4, 8), dtype=np.int32), {1})


def test_each_epoch_is_a_true_permutation_by_seed() -> None:
    rows = np.arange(100, 1100)
    epochs = []
    for epoch in range(2):
        seen = [b for _, b in batches(rows, 100, 5, epoch * 10, epoch * 10 + 10)]
        assert sorted(np.concatenate(seen)) == rows.tolist()
        epochs.append(seen)
    first = epochs[0][0]
    assert first.tolist() != epochs[1][0].tolist()
    # Tokens of one batch come from everywhere: neighbours in the text don't travel together.
    assert (np.diff(first) == 1).sum() < 30
    again = next(batches(rows, 100, 5, 17, 18))[1]
    assert again.tolist() == epochs[1][7].tolist()
    assert next(batches(rows, 100, 6, 0, 1))[1].tolist() != first.tolist()


def test_held_out_rows_are_never_trained_on() -> None:
    data = InMemory()
    train(data)
    assert max(int(rows.max()) for rows in data.asked) < 2600


# --- what comes out ------------------------------------------------------------------------------


def explained(sae: Sae, x: Tensor) -> float:
    error = x - sae.decode(sae.encode(x), x)
    return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_training_learns_and_the_sae_takes_raw_activations(architecture: str) -> None:
    data = InMemory()
    sae = train(data, architecture=architecture, steps=400)
    x = data.x[HELD_OUT]
    assert explained(sae, x) > 0.85
    assert sae.conventions.normalize_activations == "none"
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    l0 = len(sae.encode(x).values) / len(x)
    if architecture == "topk":
        assert (sae.architecture, sae.k) == ("topk", K)
        assert l0 <= K
    else:
        assert sae.architecture == "jumprelu"
        assert abs(l0 - K) <= 0.02 * K


def test_a_short_batchtopk_run_still_saves_the_right_threshold() -> None:
    """Where a moving average from zero would be far off."""
    data = InMemory()
    sae = train(data, architecture="batchtopk", steps=3)
    x = data.x[HELD_OUT]
    assert abs(len(sae.encode(x).values) / len(x) - K) <= 0.02 * K


def test_the_folded_sae_reconstructs_what_training_did(tmp_path: Path) -> None:
    """The last logged batch's error, from weights at learning rate 0."""
    data = InMemory()
    rows = next(batches(TRAIN, BATCH, 0, 0, 1))[1]
    sae = train(data, steps=1, lr=0.0, metrics=tmp_path / "metrics.jsonl", log_every=1)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text())
    x = data.x[rows]
    error = x - sae.decode(sae.encode(x), x)
    assert float(error.square().sum(-1).mean()) == pytest.approx(logged["mse"], rel=1e-4)
    assert explained(sae, x) == pytest.approx(logged["ev"], abs=1e-4)


def test_dead_latents_are_revived_by_the_aux_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    initial = loop._initial

    def mostly_dead(*arguments: Any) -> Weights:
        weights = initial(*arguments)
        weights.b_enc[8:] = -3.0  # too low to be among the k, not too low to be reached
        return weights

    monkeypatch.setattr(loop, "_initial", mostly_dead)

    def alive(aux_coefficient: float) -> int:
        data = InMemory()
        sae = train(data, steps=400, aux_coefficient=aux_coefficient, dead_after_tokens=640)
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
    rates = [loop._rate(step, 100, 1.0, 10, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:80] == [1.0] * 70
    assert rates[-1] == pytest.approx(1 / 20)
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[80:]) < 0)


def test_metrics_are_one_json_object_a_logged_step(tmp_path: Path) -> None:
    train(metrics=tmp_path / "metrics.jsonl", steps=23)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 23]
    for line in lines:
        assert set(line) == {
            "step", "tokens", "loss", "mse", "aux", "l0", "ev", "dead_fraction", "lr",
            "tokens_per_s", "seconds",
        }  # fmt: skip
        assert line["tokens"] == line["step"] * BATCH
        assert line["l0"] == K
        assert all(math.isfinite(value) for value in line.values())
    assert lines[-1]["ev"] > lines[0]["ev"]


@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_saved_saes_load_in_sae_lens_and_encode_identically(
    architecture: str, tmp_path: Path
) -> None:
    from sae_lens import SAE

    data = InMemory()
    sae = train(data, architecture=architecture)
    sae.save(tmp_path / "sae")
    oracle = SAE.load_from_disk(tmp_path / "sae")
    expected = oracle.encode(data.x)
    codes = sae.encode(data.x)
    torch.testing.assert_close(codes.dense(D_SAE), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sae.decode(codes, data.x), oracle.decode(expected), atol=1e-5, rtol=1e-5
    )
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
        ({"steps": 0}, "steps"),
        ({"batch_size": 5000}, "fewer than one batch"),
        ({"b_dec_init": "zero"}, "b_dec_init"),
        ({"decay": 2.0}, "decay is 2"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingError, match=named):
        train(**changes)


def test_nan_activations_and_a_diverging_loss_say_where_and_what_to_try() -> None:
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
        with pytest.raises(TrainingError, match=r"loss is .* at step \d+ of 60; try a lower"):
            train(architecture=architecture, lr=1e25)
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


def same(first: Sae, second: Sae) -> bool:
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
    if first.threshold is None or second.threshold is None:
        return equal and first.threshold is second.threshold
    return equal and torch.equal(first.threshold, second.threshold)


def steps_logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_killed_run_ends_with_the_same_weights(architecture: str, tmp_path: Path) -> None:
    # More than one epoch, with dead latents, and death between two checkpoints, twice.
    settings_: dict[str, Any] = {
        "architecture": architecture,
        "dead_after_tokens": 500,
        "d_sae": 128,
        "checkpoint_steps": 8,
    }
    unbroken = train(metrics=tmp_path / "whole.jsonl", checkpoints=tmp_path / "whole", **settings_)
    paths = {"metrics": tmp_path / "m.jsonl", "checkpoints": tmp_path / "c"}
    for times in (24, 29):
        with pytest.raises(Killed):
            train(Dying(times), **paths, **settings_)
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 47, "to')  # killed while writing
    data = InMemory()
    resumed = train(data, **paths, **settings_)
    assert len(data.asked) < 40  # it did go on, rather than start again
    assert same(resumed, unbroken)
    assert steps_logged(tmp_path / "m.jsonl") == steps_logged(tmp_path / "whole.jsonl")
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-00000056", "step-00000060"]
    # Once more: nothing is left to do.
    data = InMemory()
    assert same(train(data, **paths, **settings_), unbroken)
    assert len(data.asked) <= 8


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths: dict[str, Any] = {"checkpoints": tmp_path / "c", "checkpoint_steps": 8}
    unbroken = train()
    with pytest.raises(Killed):
        train(Dying(40), **paths)
    newest = sorted((tmp_path / "c").iterdir())[-1]
    for name, content in (("state.safetensors", b"half"), ("state.json", b"{")):
        (newest / name).write_bytes(content)
        with pytest.raises(Killed):
            train(Dying(3), **paths)
        assert "is damaged" in capsys.readouterr().out
    assert same(train(**paths), unbroken)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(Dying(20), checkpoints=tmp_path / "c", checkpoint_steps=8)
    with pytest.raises(TrainingError, match=r"k=4 \(now 5\), lr=0.003 \(now 0.001\)") as raised:
        train(checkpoints=tmp_path / "c", k=5, lr=1e-3)
    assert "\n" not in str(raised.value)
    with pytest.raises(TrainingError, match="activations="):
        train(InMemory(seed=1), checkpoints=tmp_path / "c")
    with pytest.raises(TrainingError, match="rows="):
        fit(
            InMemory(), TRAIN[1:], HELD_OUT, architecture="topk", d_sae=D_SAE, k=K, steps=60,
            batch_size=BATCH, lr=3e-3, identity=IDENTITY, checkpoints=tmp_path / "c",
        )  # fmt: skip


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: dict[str, Any] = {"checkpoints": tmp_path / "c", "checkpoint_steps": 8}
    with monkeypatch.context() as patch:
        real, calls = checkpoints_module.save_file, iter(range(9))

        def sometimes_full(*args: Any) -> None:
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            real(*args)

        patch.setattr(checkpoints_module, "save_file", sometimes_full)
        with pytest.raises(TrainingError, match=r"No space left.*goes on"):
            train(**paths)
    assert [path.name for path in sorted((tmp_path / "c").iterdir())] == [
        "step-00000008",
        "step-00000016",
    ]
    assert same(train(**paths), train())


PROGRAM = """
import sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.test_training import InMemory, train

class Slow(InMemory):
    def rows(self, indices):
        time.sleep(0.02)
        return super().rows(indices)

folder = Path(sys.argv[1])
train(Slow(), checkpoints=folder / "c", checkpoint_steps=3, metrics=folder / "m.jsonl", steps=300)
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
        while len(list((tmp_path / "c").glob("step-*"))) < 2:
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
        resumed = train(
            data, steps=300, checkpoints=tmp_path / "c", checkpoint_steps=3,
            metrics=tmp_path / "m.jsonl",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert len(data.asked) < 300
    assert same(resumed, whole)
    logged = steps_logged(tmp_path / "m.jsonl")
    assert logged == list(range(5, 301, 5))
