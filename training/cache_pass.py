"""Contexts through the model: activations at several hook points from one pass that stops early."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.shards import ContextBatch
from saesteer.errors import CacheError
from saesteer.training.cache_products import fast_products
from saesteer.training.packing import Context

# Tokens a forward pass where nobody has looked for a better size.
TOKENS_A_PASS = {"cpu": 1024, "cuda": 65536, "mps": 8192}
# The most that is tried: on a CPU more only costs memory; on CUDA memory itself is the bound.
MOST_TOKENS_A_PASS = {"cpu": 16384, "cuda": 2**20, "mps": 65536}
# A size is tried for so long, in seconds, but at least once.
TRIED_SECONDS = 0.25


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
    stream = iter(contexts)
    waiting = list(islice(stream, 1))
    size = batch_size or (usual_batch_size(model, len(waiting[0].tokens)) if waiting else 1)
    check_batch_size(batch_size)
    while waiting := waiting + list(islice(stream, size - len(waiting))):
        batch = waiting[:size]
        try:
            with fast_products(model):
                (found,) = one_pass(model, batch, [point], first_context=first_context)
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


def one_pass(
    model: PreTrainedModel,
    contexts: Sequence[Context],
    points: Sequence[HookPoint],
    *,
    first_context: int = 0,
) -> list[Tensor]:
    """Activations of equally long contexts at each point, from one forward pass.

    Returns, for each point, [contexts, context_size, d_model] in the model's dtype, on its device.

    Raises:
        CacheError: an activation is not finite, or a token is not among the model's.
    """
    known = model.get_input_embeddings().weight.shape[0]
    tokens = np.stack([context.tokens for context in contexts])
    if tokens.max() >= known:
        raise CacheError(
            f"token {tokens.max()} is not among the {known} that the model knows: the "
            "tokenizer belongs to another model; load both from one folder or Hub id"
        )
    found = activations(model, points, torch.from_numpy(tokens).long())
    for point, x in found.items():
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])
            raise CacheError(
                f"the activations of context {first_context + bad} at {point} are not finite; "
                "load the model with --model.dtype float32 (or bfloat16), or check its weights"
            )
    return [found[point] for point in points]


def check_batch_size(batch_size: int | None) -> None:
    """Raise CacheError for a batch size below 1."""
    if batch_size is not None and batch_size < 1:
        raise CacheError(f"batch size {batch_size}; expected 1 or more contexts")


def usual_batch_size(model: PreTrainedModel, context_size: int) -> int:
    """Contexts a forward pass that suit the device, without trying."""
    return max(1, TOKENS_A_PASS.get(model.device.type, 1024) // context_size)


def found_batch_size(
    model: PreTrainedModel, contexts: Sequence[Context], points: Sequence[HookPoint]
) -> int:
    """The contexts a forward pass with which tokens go through fastest: 1, 2, 4, … are timed.

    The search ends where two doublings have brought less than 5%, or the memory is full. A size
    that is less than 5% slower than the fastest and smaller is taken in its place.

    Args:
        contexts: to try it on; no size above their number is.
    """
    size, rates = 1, dict[int, float]()
    most = MOST_TOKENS_A_PASS.get(model.device.type, 16384) // len(contexts[0].tokens)
    while size <= min(len(contexts), max(1, most)):
        try:
            rates[size] = _tokens_a_second(model, contexts[:size], points)
        except torch.OutOfMemoryError:
            break
        best = max(rates.values())
        if all(rates.get(size >> i, best) < 1.05 * rates.get(size >> 2, 0) for i in (0, 1)):
            break
        size *= 2
    if not rates:
        raise CacheError(
            "not even one context fits into the device's memory; use a shorter "
            "--cache.context-size, or --model.dtype bfloat16"
        )
    return min(size for size, rate in rates.items() if rate * 1.05 >= max(rates.values()))


def _tokens_a_second(
    model: PreTrainedModel, contexts: Sequence[Context], points: Sequence[HookPoint]
) -> float:
    """Of the fastest of a few passes: another program can slow one down, none speeds one up."""
    seconds, spent = list[float](), 0.0
    while spent < TRIED_SECONDS or len(seconds) < 2:
        begin = time.perf_counter()
        for x in one_pass(model, contexts, points):
            x.cpu()
        seconds.append(time.perf_counter() - begin)
        spent += seconds[-1]
        if seconds[-1] > 4 * TRIED_SECONDS:  # so large a model needs no second look
            break
    return len(contexts) * len(contexts[0].tokens) / min(seconds)
