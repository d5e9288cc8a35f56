"""From contexts to shards of activations: resumable, and found again by what made them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from saesteer.core.files import alone
from saesteer.core.model import HookPoint
from saesteer.core.shard_files import DTYPES
from saesteer.core.shards import Shards
from saesteer.errors import CacheError, TextError, did_you_mean
from saesteer.training.cache_fill import fill, on_every
from saesteer.training.cache_pass import activation_batches, check_batch_size
from saesteer.training.cache_targets import Target, opened
from saesteer.training.packing import Context
from saesteer.training.ranks import ALONE, Ranks

__all__ = ["activation_batches", "cache_activations"]

# Bytes of activations a shard: what is lost when a run is killed, and what is held in memory.
SHARD_BYTES = 64 * 2**20


def cache_activations(
    model: PreTrainedModel,
    contexts: Callable[[], Iterator[Context]],
    points: Sequence[HookPoint],
    folder: Path,
    *,
    n_contexts: int,
    context_size: int,
    d_model: int,
    dtype: str,
    made_from: Mapping[str, Any],
    batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> list[Shards]:
    """Write the activations of the first `n_contexts` contexts, or find them written already.

    All points are read in one pass over the text; where some are there already, only the others
    are. A run that was killed goes on after the last whole shard, and a damaged shard alone is made
    again; the result is the same to the bit as that of a run that wasn't.

    Args:
        contexts: makes the stream of contexts anew, the same each time.
        points: the first one's cache is in `folder`, each other's in `folder/<point>`, with the
            same tokens row for row.
        dtype: "float16", "bfloat16" or "float32" on disk.
        made_from: everything that the activations depend on, JSON; another cache is refused. Its
            "special_ids" are left out of the statistics.
        batch_size: contexts a forward pass. Where not given, sizes are timed, and the one found is
            kept in the manifest: what is made later is made with it too.
        ranks: the processes that share the work, shard by shard; all must call this.

    Returns:
        The cache of each point, in their order.

    Raises:
        CacheError: a folder holds another cache or another run is writing to it; an
            activation is not finite or doesn't fit into `dtype`.
        RunError: the disk is full or the folder can't be written.
    """
    if dtype not in DTYPES:
        raise CacheError(
            f"unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; use {', '.join(DTYPES)}"
        )
    check_batch_size(batch_size)
    if not points:
        raise CacheError("no hook point to cache was given; give one, such as layers.6.resid_post")
    for point in points:
        if list(points).count(point) > 1:
            raise CacheError(f"{point} twice among the hook points to cache; give each once")
    made_from = {**made_from, "dtype": dtype, "n_contexts": n_contexts}
    about = {"context_size": context_size, "d_model": d_model, "dtype": dtype}
    a_shard = max(1, SHARD_BYTES // (context_size * d_model * DTYPES[dtype].itemsize))
    with ExitStack() as stack:

        def open_all() -> list[Target]:
            stack.enter_context(alone(folder))
            return opened(folder, points, made_from, about)

        def finish() -> None:
            if ranks.first:
                for target in targets:
                    target.finish()

        # One process holds the lock and checks what is there, for all.
        targets = on_every(ranks, lambda: open_all() if ranks.first else [])[0]
        if not all(target.finished for target in targets):
            lengths = _lengths(targets, n_contexts, a_shard)
            fill(model, contexts, targets, lengths, batch_size=batch_size, ranks=ranks)
            done = targets[0].n_contexts
            if not done:
                raise TextError("the text holds no whole context; give more text")
            if done < n_contexts and ranks.first:
                warnings.warn(
                    f"the text holds {done * context_size:,} tokens in whole contexts, fewer than "
                    f"the {n_contexts * context_size:,} asked for; all of them were cached",
                    stacklevel=2,
                )
            on_every(ranks, finish)
        return [Shards(target.folder) for target in targets]


def _lengths(targets: Sequence[Target], n_contexts: int, a_shard: int) -> list[int]:
    """Contexts of every shard: what exists keeps its length, also when SHARD_BYTES changes."""
    longest = max(targets, key=lambda target: target.n_contexts)
    lengths = [entry["contexts"] for entry in longest.entries]
    # A finished cache of less than was asked for: the text ended there.
    left = 0 if longest.ended else n_contexts - longest.n_contexts
    return lengths + [min(a_shard, left - at) for at in range(0, left, a_shard)]
