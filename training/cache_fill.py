"""Making the shards that are missing: one a process at a time, written while the next is made."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import accumulate, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from saesteer.core.model import HookPoint
from saesteer.core.progress import progress
from saesteer.core.shard_files import DTYPES, ContextBatch, shard_tensors, write_shard
from saesteer.errors import CacheError, SaesteerError
from saesteer.training.cache_pass import found_batch_size, passing, usual_batch_size
from saesteer.training.cache_targets import Target, check_same_text
from saesteer.training.packing import Context
from saesteer.training.ranks import Ranks
from saesteer.training.stream import prefetched

# Below this, looking for the best batch size takes longer than it saves.
SEARCHED_TOKENS = 2**19

T = TypeVar("T")


def fill(
    model: PreTrainedModel,
    contexts: Callable[[], Iterator[Context]],
    targets: list[Target],
    lengths: Sequence[int],
    *,
    batch_size: int | None,
    ranks: Ranks,
) -> None:
    """Make what the targets lack of shards of these lengths, as far as the text goes.

    Args:
        contexts, batch_size, ranks: as in `cache.cache_activations`.

    Raises:
        CacheError, RunError: as there; on every rank, whichever it happened on.
    """
    n_tokens = sum(lengths) * targets[0].about["context_size"]
    with (
        ExitStack() as stack,
        ThreadPoolExecutor(1) as writer,
        progress("cache", n_tokens) if ranks.first else tqdm(disable=True) as bar,
    ):

        def chosen() -> int:
            return batch_size or _batch_size(model, contexts, targets, lengths)

        size = on_every(ranks, lambda: chosen() if ranks.first else 0)[0]
        bar.set_postfix_str(f"{size} contexts a pass")
        bar.unpause()  # the search is no part of the rate
        filling = _Filling(model, targets, lengths, size, ranks, writer, bar)
        filling.may_shrink = batch_size is None
        try:
            stream = contexts()
            if model.device.type != "cpu":  # there the reader would only take the model's cores
                stream = stack.enter_context(closing(prefetched(stream, lengths[0])))
            for first in range(0, len(lengths), ranks.size):
                if not filling.turn(stream, first):
                    break
            filling.turn(iter(()), len(lengths))
        except BaseException:
            filling.rescue()
            raise


def on_every(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work` returned on every rank, by rank; where it failed on one, all of them stop."""
    if ranks.size == 1:
        return [work()]
    mine, problem = None, None
    try:
        mine = work()
    except Exception as error:
        problem = error
    said = ranks.objects((mine, problem and f"{type(problem).__name__}: {problem}"))
    if problem is not None:
        raise problem
    for rank, (_, told) in enumerate(said):
        if told is not None:
            raise CacheError(f"process {rank} of {ranks.size} failed ({told}); all of them stop")
    return [value for value, _ in said]


def _batch_size(
    model: PreTrainedModel,
    contexts: Callable[[], Iterator[Context]],
    targets: Sequence[Target],
    lengths: Sequence[int],
) -> int:
    """The one of the shards that are there; else the fastest, where there is much to do."""
    for target in targets:
        for entry in reversed(target.entries):
            return int(entry["batch_size"])
    context_size = targets[0].about["context_size"]
    if sum(lengths) * context_size < SEARCHED_TOKENS:
        return usual_batch_size(model, context_size)
    some = list(islice(contexts(), lengths[0]))
    if not some:
        return 1
    with passing(model, [target.point for target in targets]) as one_pass:
        return found_batch_size(one_pass, some, model.device.type)


class _Filling:
    """The state of `fill`: what is being written, and the batch size, which can shrink."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[Target],
        lengths: Sequence[int],
        size: int,
        ranks: Ranks,
        writer: ThreadPoolExecutor,
        bar: Any,
    ):
        self._model, self._targets, self._lengths = model, targets, lengths
        self._size, self._ranks, self._writer, self._bar = size, ranks, writer, bar
        self._first_contexts = [0, *accumulate(lengths)]
        self._writing: list[tuple[int, int, Future[dict[str, Any]]]] = []
        self.may_shrink = True

    def turn(self, stream: Iterator[Context], first: int) -> bool:
        """Each rank makes one of the shards from `first` on; whether the text goes on after them.

        The shards of the turn before are then on the disk, and in the manifests.
        """
        found = on_every(self._ranks, lambda: self._turn(stream, first))
        for written, _ in found:
            for target, number, entry in written:
                self._targets[target].put(number, entry)
        on_every(self._ranks, lambda: self._save({at for w, _ in found for at, _, _ in w}))
        return all(goes_on for _, goes_on in found)

    def rescue(self) -> None:
        """Keep the shards that are being written while an error ends the rest."""
        if self._ranks.size == 1:  # no other rank can be asked any more
            for at, number, future in self._writing:
                with suppress(SaesteerError):
                    self._targets[at].put(number, future.result())
                    self._targets[at].save()

    def _save(self, changed: set[int]) -> None:
        if self._ranks.first:
            for at in changed:
                self._targets[at].save()

    def _turn(
        self, stream: Iterator[Context], first: int
    ) -> tuple[list[tuple[int, int, dict[str, Any]]], bool]:
        numbers = range(first, min(first + self._ranks.size, len(self._lengths)))
        goes_on = True
        made: list[tuple[int, int, dict[str, Tensor], int]] = []
        for number in numbers:
            some = list(islice(stream, self._lengths[number]))
            goes_on = len(some) == self._lengths[number]
            if number % self._ranks.size == self._ranks.rank:
                made = self._made(number, some)
            else:
                self._bar.update(sum(len(context.tokens) for context in some))
        written = [(at, number, future.result()) for at, number, future in self._writing]
        self._writing = [
            (at, number, self._writer.submit(self._write, at, number, tensors, size))
            for at, number, tensors, size in made
        ]
        return written, goes_on

    def _write(self, at: int, number: int, tensors: dict[str, Tensor], size: int) -> dict[str, Any]:
        return write_shard(self._targets[at].folder, number, tensors) | {"batch_size": size}

    def _made(
        self, number: int, contexts: list[Context]
    ) -> list[tuple[int, int, dict[str, Tensor], int]]:
        """(target, number, what its shard holds, batch size) of the targets that lack it."""
        tokens = np.stack([c.tokens for c in contexts]) if contexts else np.empty((0, 0), np.int32)
        check_same_text(tokens, self._targets, number)
        lack = [at for at, target in enumerate(self._targets) if target.lacks(number)]
        if not contexts or not lack:
            self._bar.initial += tokens.size  # so that the rate is the model's
            self._bar.update(tokens.size)
            return []
        documents = np.stack([context.documents for context in contexts])
        first = self._first_contexts[number]
        size = next(
            (
                int(target.entries[number]["batch_size"])
                for target in self._targets
                if number < len(target.entries)
            ),
            self._size,
        )
        while True:
            try:
                found = self._read(contexts, [self._targets[at] for at in lack], first, size)
                break
            except torch.OutOfMemoryError:
                if not self.may_shrink or size == 1:
                    raise
            # From the shard's first context on, so that a shard has one batch size.
            size = self._size = max(1, size // 2)
            self._bar.set_postfix_str(f"{size} contexts a pass")
        special_ids = self._targets[0].about["made_from"].get("special_ids", [])
        return [
            (
                at,
                number,
                shard_tensors(ContextBatch(tokens, documents, x, first), special_ids),
                size,
            )
            for at, x in zip(lack, found, strict=True)
        ]

    def _read(
        self, contexts: list[Context], targets: list[Target], first: int, size: int
    ) -> list[Tensor]:
        """Activations of a shard's contexts at each target's point, as they are stored."""
        about = targets[0].about
        dtype = DTYPES[about["dtype"]]
        shape = len(contexts), about["context_size"], about["d_model"]
        stored = [torch.empty(shape, dtype=dtype) for _ in targets]
        points = [target.point for target in targets]
        begun = self._bar.n
        try:
            with passing(self._model, points) as one_pass:
                for at in range(0, len(contexts), size):
                    batch = contexts[at : at + size]
                    found = one_pass(batch, first + at)
                    for point, x, out in zip(points, found, stored, strict=True):
                        out[at : at + size] = _rounded(x, dtype, point)
                    self._bar.update(len(batch) * about["context_size"])
        except torch.OutOfMemoryError:
            self._bar.update(begun - self._bar.n)
            raise
        return stored


def _rounded(x: Tensor, dtype: torch.dtype, point: HookPoint) -> Tensor:
    small = x.to(dtype)
    if dtype != x.dtype and not bool(torch.isfinite(small).all()):
        raise CacheError(
            f"activations at {point} are as large as {float(x.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; cache them with --cache.dtype bfloat16"
        )
    return small
