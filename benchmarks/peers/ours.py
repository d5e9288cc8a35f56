"""Our own trainer as the others are set, the work that all are given, and the floor of a step."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from peers.task import SparseFeatures, Task
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.training.choose import batch_topk, topk
from saesteer.training.products import decode
from saesteer.training.ranks import ALONE
from saesteer.training.settings import Settings
from saesteer.training.step import encoder_of
from saesteer.training.stream import Batch, CachedStream
from saesteer.training.trainer import Trainer

# Batches of activations: to learn from, for our thresholds, and to measure EV on.
TRAIN, HELD_OUT, TEST = 16, 2, 1
# Longer than any run: the schedules stay flat and AuxK off.
NEVER = 10**12


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
            "192x2048x16x4096"
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
        dead_after=NEVER, products=products,
    )  # fmt: skip
    identity = {"hook_point": HookPoint(0, "resid_post"), "model_id": None}
    return Trainer(settings, given.stream, steps=NEVER, identity=identity)


def task_of(trainer: Trainer, about: Shape) -> Task:
    """What a peer needs to do the same."""
    plan = trainer.plan
    return Task(
        trainer.settings.architecture, *about, trainer.lr, plan.variance, trainer.sparsity,
        plan.bandwidth, plan.widths,
    )  # fmt: skip


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
