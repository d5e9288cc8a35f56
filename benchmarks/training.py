"""Training one SAE: our step against those of sae-lens, dictionary_learning and a dense torch loop.

Everyone is given the same activations in the same order (`peers.task.SparseFeatures`, fixed seed),
the same first weights and the same constant learning rate, without AuxK; nobody's data loading is
timed. First ours and sae-lens's default trainer learn for --steps steps, which gives losses and the
explained variance (EV) of the SAEs as saved, read back with sae-lens, on rows that nobody has seen.
Then everyone is given the weights that ours has arrived at, and steps are timed side by side,
forwards and backwards in turn; all first losses must agree. Settings of sae-lens that bear on speed
are tried before, and the fastest is what `sae_lens_ms` is.

`floor_ms` is what no TopK step can do without: the encoder's product in the dtype that ours makes
it in, a few rows at a time as ours does, and four passes of k · batch · d multiply-adds over
gathered rows (the code decoded, its gradient, and those of decoder and encoder), each at the speed
at which ours decodes.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
import torch
from peers.apart import DictionaryLearning, NotInstalledError
from peers.dense import Dense
from peers.task import SparseFeatures, Task
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.training.choose import batch_topk, topk
from saesteer.training.products import decode
from saesteer.training.ranks import ALONE
from saesteer.training.step import encoder_of
from saesteer.training.stream import Batch, CachedStream
from saesteer.training.trainer import Settings, Trainer

TITLE = "A training step: sae-lens's time / ours"
SHAPES = ("192x2048x16x4096", "288x2304x32x4096", "768x16384x32x4096")
STEPS = (120, 120, 16)
OTHERS = ("standard", "jumprelu", "gated", "matryoshka")
PEERS = ("dense", "dictionary_learning")
# Batches of activations: to learn from, for our thresholds, and to measure EV on.
TRAIN, HELD_OUT, TEST = 16, 2, 1
# Rounds before those that count.
DROPPED = 2
# Rounds in which sae-lens's ways of stepping are compared.
TRIES = 3
_NEVER = 10**12


class Shape(NamedTuple):
    """d × d_sae × k × batch."""

    d: int
    d_sae: int
    k: int
    batch: int


def shape(text: str) -> Shape:
    """Read '192x2048x16x4096'."""
    numbers = [int(part) for part in text.split("x")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[2] > numbers[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: expected d x d_sae x k x batch with k ≤ d_sae, such as "
            f"{SHAPES[0]}"
        )
    return Shape(*numbers)


class Given(NamedTuple):
    """A shape's activations: batches to learn from, in order, and rows to measure on."""

    stream: CachedStream
    batches: list[Batch]
    test: Tensor


def activations(about: Shape) -> Given:
    """Activations of a shape, the same at every call."""
    data = SparseFeatures((TRAIN + HELD_OUT + TEST) * about.batch, about.d, about.k)
    ends = np.arange(TRAIN + HELD_OUT + TEST + 1) * about.batch
    train, held_out = np.arange(ends[TRAIN]), np.arange(ends[TRAIN], ends[TRAIN + HELD_OUT])
    stream = CachedStream((data,), train, held_out, batch_size=about.batch)
    batches = [batch for _, batch in stream.batches(0, TRAIN)]
    return Given(stream, batches, data.x[ends[TRAIN + HELD_OUT] :])


def our_trainer(
    architecture: str, about: Shape, given: Given, lr: float | None, products: str = "auto"
) -> Trainer:
    """Ours, at a constant rate and without AuxK."""
    settings = Settings(
        architecture, about.d_sae, about.k, lr=lr, warm_up=0, decay=0, sparsity_warm_up=0,
        dead_after=_NEVER, products=products,
    )  # fmt: skip
    identity = {"hook_point": HookPoint(0, "resid_post"), "model_id": None}
    return Trainer(settings, given.stream, steps=_NEVER, identity=identity)


def task_of(trainer: Trainer, about: Shape) -> Task:
    """What a peer needs to do the same."""
    plan = trainer.plan
    return Task(
        trainer.settings.architecture, *about, trainer.lr, plan.variance, trainer.sparsity,
        plan.bandwidth, plan.widths,
    )  # fmt: skip


def stepper(step: Callable[[Any], float], xs: Iterator[Any], losses: list[float]) -> Callable:
    """A call that makes one step on the next batch, keeps its loss, and returns milliseconds."""

    def run() -> float:
        x = next(xs)
        begin = time.perf_counter()
        loss = step(x)
        ms = 1000 * (time.perf_counter() - begin)
        losses.append(loss)
        return ms

    return run


def learn(
    trainer: Trainer, float32: Trainer | None, about: Shape, given: Given, steps: int
) -> dict[str, Any]:
    """Ours and sae-lens's default for some steps: losses at the end, and EV of what is saved."""
    from peers.sae_lens_trainer import SaeLens

    theirs = SaeLens(task_of(trainer, about), trainer.weights)
    losses: dict[str, list[float]] = {"ours": [], "float32": [], "sae_lens": []}
    batches = itertools.islice(itertools.cycle(given.batches), steps)
    for batch in progress("learn", steps, unit="step", iterable=batches):
        losses["ours"].append(trainer.step(batch)["loss"])
        losses["sae_lens"].append(theirs.step(batch.x * trainer.scales.x))
        if float32 is not None:
            losses["float32"].append(float32.step(batch)["loss"])
    agree({name: values[:1] for name, values in losses.items() if values})
    end = {
        name: statistics.mean(values[-max(1, steps // 10) :])
        for name, values in losses.items()
        if values
    }
    test = given.test * trainer.scales.x
    with tempfile.TemporaryDirectory() as folder:
        trainer.finished().save(Path(folder, "ours"))
        theirs.save(Path(folder, "theirs"))
        ev_ours, l0_ours = quality(Path(folder, "ours"), given.test)
        ev_theirs, l0_theirs = quality(Path(folder, "theirs"), test)
    found: dict[str, Any] = {
        "steps": steps,
        "loss_ratio_at_equal_steps": end["ours"] / end["sae_lens"],
        "ev_ours": ev_ours,
        "ev_sae_lens": ev_theirs,
        "l0_ours": l0_ours,
        "l0_sae_lens": l0_theirs,
        # Where a threshold is saved, what the SAE is worth with the choice that it learnt with.
        "ev_sae_lens_in_training": explained(test, theirs.reconstruct(test)),
    }
    if float32 is not None:
        found["loss_ratio_to_float32"] = end["ours"] / end["float32"]
    return found


def quality(folder: Path, x: Tensor) -> tuple[float, float]:
    """EV and L0 of a saved SAE on x [n, d], as sae-lens loads and runs it."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        code = sae.encode(x)
        return explained(x, sae.decode(code)), float((code > 0).sum(-1).float().mean())


def explained(x: Tensor, out: Tensor) -> float:
    """Explained variance of x [n, d]."""
    return 1 - float((x - out).square().sum() / (x - x.mean(0)).square().sum())


def agree(losses: dict[str, list[float]]) -> None:
    """Stop where first steps with the same weights on the same batch don't give the same loss."""
    for name, (loss, *_) in losses.items():
        # Autocast's products are bfloat16's, and so are the losses made of them.
        most = 0.05 if "autocast" in name else 1e-3
        if abs(loss / losses["ours"][0] - 1) > most:
            raise SystemExit(
                f"the first loss of {name} is {loss:.6g} and that of ours "
                f"{losses['ours'][0]:.6g}: they don't do the same work, so nothing was timed"
            )


def floor(trainer: Trainer, xs: Iterator[Batch]) -> Callable[[], float]:
    """A call that makes the products that can't be avoided, and returns milliseconds."""
    plan, weights = trainer.plan, trainer.weights

    def run() -> float:
        encoder = encoder_of(plan, weights, next(xs).x * trainer.scales.x)
        if plan.architecture.chooses == "row":
            chosen = topk(encoder, plan.k, ALONE)
        else:
            chosen = batch_topk(encoder, plan.k * plan.batch_size, ALONE)
        begin = time.perf_counter()
        for _ in encoder.pieces():
            pass
        for _ in range(4):
            decode(chosen.latents, chosen.values, chosen.starts, weights["decoder"])
        return 1000 * (time.perf_counter() - begin)

    return run


def timed(
    trainer: Trainer, float32: Trainer | None, about: Shape, given: Given, rounds: int,
    peers: tuple[str, ...],
) -> dict[str, Any]:
    """Median milliseconds of everyone's steps, side by side, from the weights ours has now."""
    from peers.sae_lens_trainer import SaeLens, ways

    task = task_of(trainer, about)
    scaled = [batch.x * trainer.scales.x for batch in given.batches]
    losses: dict[str, list[float]] = {}
    sides: dict[str, Callable[[], float]] = {}
    not_run: dict[str, str] = {}

    def side(name: str, step: Callable[[Any], float], xs: list[Any]) -> None:
        sides[name] = stepper(step, itertools.cycle(xs), losses.setdefault(name, []))

    for way in ways(task.architecture):
        side(f"sae-lens {way}", SaeLens(task, trainer.weights, way).step, scaled)
    tried = results.alternating(sides, TRIES, lambda line: None)
    fastest = min(tried, key=lambda name: statistics.median(tried[name][1:]))
    say(f"fastest of sae-lens: {fastest}")
    for name in [name for name in sides if name not in ("sae-lens default", fastest)]:
        del sides[name]
    with contextlib.ExitStack() as stack:
        if "dictionary_learning" in peers:
            try:
                other = DictionaryLearning(task, trainer.weights, torch.stack(scaled))
            except NotInstalledError as error:
                not_run["dictionary_learning"] = str(error)
            else:
                stack.callback(other.close)
                kept = losses.setdefault("dictionary_learning", [])

                def apart() -> float:
                    ms, loss = other.step()
                    kept.append(loss)
                    return ms

                sides["dictionary_learning"] = apart
        if "dense" in peers:
            side("dense", Dense(task, trainer.weights).step, scaled)
        if trainer.plan.architecture.chooses and not trainer.plan.architecture.nested:
            sides["floor"] = floor(trainer, itertools.cycle(given.batches))
        side("ours", lambda batch: trainer.step(batch)["loss"], given.batches)
        if float32 is not None:
            for name, tensor in float32.weights.items():
                tensor.copy_(trainer.weights[name])
            side("ours float32", lambda batch: float32.step(batch)["loss"], given.batches)
        found = results.alternating(sides, rounds + DROPPED, say)
    agree(losses)
    times = {name: each[DROPPED:] for name, each in found.items()}
    medians = {name: statistics.median(each) for name, each in times.items()}
    low, high = results.quartiles(
        [a / b for a, b in zip(times[fastest], times["ours"], strict=True)]
    )
    answer: dict[str, Any] = {
        "ours_ms": medians["ours"],
        "sae_lens_ms": medians[fastest],
        "ratio": medians[fastest] / medians["ours"],
        "interval": [low, high],
        "products": str(trainer.plan.dtype).removeprefix("torch."),
        "sae_lens_way": fastest.removeprefix("sae-lens "),
        "default_ratio": medians["sae-lens default"] / medians["ours"],
        "float32_ratio": medians["sae-lens default"] / medians.get("ours float32", medians["ours"]),
        "peers": {name: medians[name] for name in PEERS if name in medians},
        "not_run": not_run,
    }
    if "floor" in medians:
        answer |= {
            "floor_ms": medians["floor"],
            "floor_fraction": medians["floor"] / medians["ours"],
        }
    return answer
