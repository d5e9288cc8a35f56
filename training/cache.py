"""From contexts to shards of activations: resumable, and found again by what made them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from saesteer.core.files import alone
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.shards import (
    DTYPES,
    ContextBatch,
    Shards,
    is_whole,
    read_manifest,
    read_tokens,
    write_manifest,
    write_shard,
)
from saesteer.errors import CacheError, TextError, did_you_mean
from saesteer.training.packing import Context

# Bytes of activations a shard: what is lost when a run is killed, and what is held in memory.
SHARD_BYTES = 64 * 2**20
# Checking more than this takes over a second, so it is shown.
SHOWN_BYTES = 512 * 2**20
# Tokens a forward pass where no batch size is given: more brings nothing on a CPU.
TOKENS_A_BATCH = {"cpu": 2048, "cuda": 65536, "mps": 8192}


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
        batch_size: contexts a forward pass; found by itself where not given, and halved when an
            accelerator's memory is too small.

    Raises:
        CacheError: an activation is NaN or infinite, or a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise CacheError(f"batch size {batch_size}; expected 1 or more contexts")
    known = model.get_input_embeddings().weight.shape[0]
    stream = iter(contexts)
    waiting: list[Context] = []
    while True:
        if not waiting:
            first = list(islice(stream, 1))
            if not first:
                return
            size = batch_size or _found_batch_size(model, len(first[0].tokens))
            waiting = first + list(islice(stream, size - 1))
        batch = waiting[:size]
        tokens = np.stack([context.tokens for context in batch])
        if tokens.max() >= known:
            raise CacheError(
                f"token {tokens.max()} is not among the {known} that the model knows: the "
                "tokenizer belongs to another model; load both from one folder or Hub id"
            )
        try:
            found = activations(model, [point], torch.from_numpy(tokens).long())[point]
        except torch.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise
            batch_size = size = size // 2
            continue
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).flatten(1).any(dim=1).nonzero()[0])
            raise CacheError(
                f"the activations of context {first_context + bad} at {point} are not finite; "
                "load the model with --model.dtype float32 (or bfloat16), or check its weights"
            )
        documents = np.stack([context.documents for context in batch])
        yield ContextBatch(tokens, documents, found.cpu(), first_context)
        first_context += len(batch)
        waiting = waiting[size:]


def cache_activations(
    model: PreTrainedModel,
    contexts: Callable[[], Iterator[Context]],
    point: HookPoint,
    folder: Path,
    *,
    n_contexts: int,
    context_size: int,
    d_model: int,
    dtype: str,
    made_from: Mapping[str, Any],
    batch_size: int | None = None,
) -> Shards:
    """Write the activations of the first `n_contexts` contexts, or find them written already.

    A run that was killed goes on after the last whole shard, and a damaged shard alone is made
    again; the result is the same to the bit as that of a run that wasn't.

    Args:
        contexts: makes the stream of contexts anew, the same each time.
        dtype: "float16", "bfloat16" or "float32" on disk.
        made_from: everything that the activations depend on, JSON; another cache is refused.
        batch_size: contexts a forward pass; found by itself where not given.

    Raises:
        CacheError: the folder holds another cache or another process is writing to it; an
            activation is not finite or doesn't fit into `dtype`.
        RunError: the disk is full or the folder can't be written.
    """
    if dtype not in DTYPES:
        raise CacheError(
            f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; use {', '.join(DTYPES)}"
        )
    made_from = {**made_from, "dtype": dtype, "n_contexts": n_contexts}
    a_shard = max(1, SHARD_BYTES // (context_size * d_model * DTYPES[dtype].itemsize))
    with alone(folder):
        for left in folder.glob(".*.partial"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        manifest = read_manifest(folder)
        if manifest is not None:
            _check_same(manifest["made_from"], made_from, folder)
        entries = list(manifest["shards"]) if manifest else []
        whole = _checked(folder, entries)
        if manifest and manifest["complete"] and all(whole):
            return Shards(folder)
        about = {
            "made_from": made_from,
            "hook_point": str(point),
            "context_size": context_size,
            "d_model": d_model,
            "dtype": dtype,
        }
        ended = manifest is not None and manifest["complete"]
        wanted = sum(entry["contexts"] for entry in entries) if ended else n_contexts
        with progress("cache", wanted * context_size) as bar:
            stream = contexts()
            number = done = 0
            while done < wanted:
                # A shard that exists keeps its length, also when SHARD_BYTES is another today.
                length = entries[number]["contexts"] if number < len(entries) else a_shard
                some = list(islice(stream, min(length, wanted - done)))
                if not some:
                    break
                if number >= len(entries) or not whole[number]:
                    shard = _shard(model, some, point, dtype, done, batch_size, bar)
                    entry = write_shard(folder, number, shard) | _statistics(shard, made_from)
                    entries[number : number + 1] = [entry]
                    write_manifest(folder, {**about, "complete": False, "shards": entries})
                else:
                    _check_same_text(some, folder, entries[number])
                    bar.initial += len(some) * context_size  # so that the rate is the model's
                    bar.update(len(some) * context_size)
                done += len(some)
                number += 1
        if not done:
            raise TextError("the text holds no whole context; give more text")
        if done < n_contexts:
            warnings.warn(
                f"the text holds {done * context_size:,} tokens in whole contexts, fewer than the "
                f"{n_contexts * context_size:,} asked for; all of them were cached",
                stacklevel=2,
            )
        write_manifest(folder, {**about, "complete": True, "shards": entries})
        return Shards(folder)


def _shard(
    model: PreTrainedModel,
    contexts: list[Context],
    point: HookPoint,
    dtype: str,
    first_context: int,
    batch_size: int | None,
    bar: Any,
) -> ContextBatch:
    parts = []
    for batch in activation_batches(
        model, contexts, point, batch_size=batch_size, first_context=first_context
    ):
        stored = batch.activations.to(DTYPES[dtype])
        if not bool(torch.isfinite(stored).all()):
            raise CacheError(
                f"activations at {point} are as large as {float(batch.activations.abs().max()):.3g}"
                f", too large for {dtype}; cache them with --cache.dtype bfloat16"
            )
        parts.append(stored)
        bar.update(batch.tokens.size)
    return ContextBatch(
        np.stack([context.tokens for context in contexts]),
        np.stack([context.documents for context in contexts]),
        torch.cat(parts),
        first_context,
    )


def _statistics(shard: ContextBatch, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Of a shard's tokens that are not special: how many, and the sum of their norms."""
    plain = torch.from_numpy(~np.isin(shard.tokens, made_from.get("special_ids", [])))
    norms = shard.activations[plain].double().norm(dim=-1)
    return {"plain_tokens": int(plain.sum()), "norm_sum": float(norms.sum())}


def _found_batch_size(model: PreTrainedModel, context_size: int) -> int:
    return max(1, TOKENS_A_BATCH.get(model.device.type, 2048) // context_size)


def _checked(folder: Path, entries: list[dict[str, Any]]) -> list[bool]:
    """Which shards have the bytes that were written."""
    size = sum(entry["bytes"] for entry in entries)
    if size <= SHOWN_BYTES:
        return [is_whole(folder, entry) for entry in entries]
    shown = progress("verify", len(entries), unit="shard", iterable=entries)
    return [is_whole(folder, entry) for entry in shown]


def _check_same_text(contexts: list[Context], folder: Path, entry: Mapping[str, Any]) -> None:
    """A data set's name can come to mean another text, which `made_from` can't tell."""
    tokens = np.stack([context.tokens for context in contexts])
    if not np.array_equal(tokens, read_tokens(folder, entry)):
        raise CacheError(
            f"the text or the tokenizer has changed since {folder / entry['file']} was cached; "
            f"use another run folder, or remove {folder} to cache the text as it is now"
        )


def _check_same(before: Any, now: Any, folder: Path, name: str = "") -> None:
    """Raise CacheError with the first value, however deep, that differs."""
    if before == now:
        return
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (*now, *before):
            _check_same(before.get(key), now.get(key), folder, f"{name}.{key}" if name else key)
    raise CacheError(
        f"{folder} holds other activations: their {name} was {_short(before)}, "
        f"asked for is {_short(now)}; use another run folder, or remove {folder}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
