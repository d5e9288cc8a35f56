"""Contexts through the model: activations at several hook points from one pass that stops early."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import reading
from saesteer.core.memory import keep_freed_memory
from saesteer.core.model import HookPoint
from saesteer.core.shards import ContextBatch
from saesteer.errors import CacheError
from saesteer.training.cache_products import fast_products
from saesteer.training.packing import Context

# Tokens a forward pass where nobody has looked for a better size.
TOKENS_A_PASS = {"cpu": 2048, "cuda": 65536, "mps": 8192}
# The most that is tried: on a CPU more only costs memory; on CUDA memory itself is the bound.
MOST_TOKENS_A_PASS = {"cpu": 8192, "cuda": 2**20, "mps": 65536}
# The fewest that are tried on a CPU, where fewer are never faster.
LEAST_TOKENS_A_PASS = 1024
# A size is tried for so long, in seconds, but at least once.
TRIED_SECONDS = 0.1


def activation_batches(
    model: PreTrainedModel,
    contexts: Iterable[Context],
    point: HookPoint,
    *,
    batch_size: int | None = None,
    first_context: int = 0,
) -> Iterator[ContextBatch]:
    """Contexts with their activations, straight from the model, in its dtype and on the CPU.

    Args:
        batch_size: contexts a forward pass; where not given, a usual one for the device, halved
            when an accelerator's memory is too small.

    Raises:
        CacheError: an activation is NaN or infinite, or a batch size below 1.
    """
    check_batch_size(batch_size)
    stream = iter(contexts)
    waiting = list(islice(stream, 1))
    size = batch_size or (usual_batch_size(model, len(waiting[0].tokens)) if waiting else 1)
    while waiting := waiting + list(islice(stream, max(0, size - len(waiting)))):
        batch = waiting[:size]
        try:
            # Entered anew each time: between batches the model is its owner's.
            with passing(model, [point]) as one_pass:
                (found,) = one_pass(batch, first_context)
        except torch.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise
            size //= 2
            continue
        yield ContextBatch(
            np.stack([context.tokens for context in batch]),
            np.stack([context.documents for context in batch]),
            found.cpu(),
            first_context,
        )
        first_context += len(batch)
        waiting = waiting[size:]


@contextmanager
def passing(
    model: PreTrainedModel, points: Sequence[HookPoint]
) -> Iterator[Callable[[Sequence[Context], int], list[Tensor]]]:
    """A function from equally long contexts, and the number of the first, to their activations.

    It returns, for each point, [contexts, context_size, d_model] in the model's dtype, on its
    device, from one forward pass; CacheError where an activation is not finite or a token is not
    among the model's. Within the context the model is good for nothing else.
    """
    known = model.get_input_embeddings().weight.shape[0]

    def one_pass(contexts: Sequence[Context], first_context: int) -> list[Tensor]:
        tokens = np.stack([context.tokens for context in contexts])
        if tokens.max() >= known:
            raise CacheError(
                f"token {tokens.max()} is not among the {known} that the model knows: the "
                "tokenizer belongs to another model; load both from one folder or Hub id"
            )
        found = read(torch.from_numpy(tokens).long())
        for point, x in found.items():
            # A sum is quicker than looking at each, and finite only where all are.
            if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])
                raise CacheError(
                    f"the activations of context {first_context + bad} at {point} are not finite; "
                    "load the model with --model.dtype float32 (or bfloat16), or check its weights"
                )
        return [found[point] for point in points]

    with fast_products(model), reading(model, points) as read:
        yield one_pass


def rounded(x: Tensor, dtype: torch.dtype, point: HookPoint) -> Tensor:
    """x as it is stored; CacheError where it is too large for that."""
    small = x.to(dtype)
    if dtype != x.dtype and not bool(torch.isfinite(small).all()):
        raise CacheError(
            f"activations at {point} are as large as {float(x.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; cache them with --cache.dtype bfloat16"
        )
    return small


@contextmanager
def workers(model: PreTrainedModel) -> Iterator[tuple[Executor, int]]:
    """Threads that run passes side by side, and how many: on a CPU as many as torch has cores.

    The passes of a small model don't fill several cores, and where one core is late, the others
    wait for it at every layer; passes of their own do neither. A GPU has one thread.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    if model.device.type != "cpu" or threads == 1:
        with ThreadPoolExecutor(1) as pool:
            yield pool, 1
        return
    torch.set_num_threads(1)  # of each thread that is started from here on, too
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool, threads
    finally:
        torch.set_num_threads(threads)


def check_batch_size(batch_size: int | None) -> None:
    """Raise CacheError for a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise CacheError(f"batch size {batch_size}; expected 1 or more contexts")


def usual_batch_size(model: PreTrainedModel, context_size: int) -> int:
    """Contexts a forward pass that suit the device, without trying."""
    return max(1, TOKENS_A_PASS.get(model.device.type, 2048) // context_size)


def found_batch_size(
    one_pass: Callable[[Sequence[Context], int], Any],
    contexts: Sequence[Context],
    pool: Executor,
    n_workers: int,
    device: str,
) -> int:
    """The contexts a forward pass with which tokens go through fastest: powers of 2 are timed.

    The search ends where two doublings have brought less than 2%, or the memory is full.

    Args:
        one_pass: from `passing`.
        contexts: to try it on; no size above their number is.
        pool, n_workers: from `workers`; each of them gets a pass at once.
        device: the model's: "cpu", "cuda", …

    Raises:
        CacheError: not even one context fits into the memory.
    """
    context_size = len(contexts[0].tokens)
    most = min(len(contexts), max(1, MOST_TOKENS_A_PASS.get(device, 8192) // context_size))
    least = LEAST_TOKENS_A_PASS // context_size if device == "cpu" else 1
    sizes = [size for i in range(most.bit_length()) if least <= (size := 2**i) <= most] or [most]
    rates: list[float] = []
    for size in sizes:
        try:
            rates.append(_contexts_a_second(one_pass, contexts[:size], pool, n_workers))
        except torch.OutOfMemoryError:
            break
        if len(rates) > 2 and max(rates[-2:]) < 1.02 * max(rates[:-2]):
            break
    if not rates:
        raise CacheError(
            "not even one context fits into the device's memory; use a shorter "
            "--cache.context-size, or --model.dtype bfloat16"
        )
    return sizes[rates.index(max(rates))]


def _contexts_a_second(
    one_pass: Callable[[Sequence[Context], int], Any],
    contexts: Sequence[Context],
    pool: Executor,
    n_workers: int,
) -> float:
    """Of the fastest of a few turns: another program can slow one down, none speeds one up."""

    def run(_: int) -> None:
        for x in one_pass(contexts, 0):
            x.cpu()

    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < TRIED_SECONDS:
        begin = time.perf_counter()
        list(pool.map(run, range(n_workers)))
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] > 4 * TRIED_SECONDS:  # a model as large as this needs no second look
            break
    return len(contexts) / min(seconds)
