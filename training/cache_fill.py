"""Making the shards that are missing: one a process at a time, written while the next is made."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from saesteer.core.progress import progress
from saesteer.core.shard_files import DTYPES, ContextBatch, shard_tensors, write_shard
from saesteer.errors import CacheError, SaesteerError
from saesteer.training.cache_pass import (
    found_batch_size,
    passing,
    rounded,
    usual_batch_size,
    workers,
)
from saesteer.training.cache_targets import Target, check_same_text
from saesteer.training.packing import Context
from saesteer.training.ranks import Ranks
from saesteer.training.stream import prefetched

# Below this, looking for the best batch size takes longer than it saves.
SEARCHED_TOKENS = 2**21

# Contexts that the reader hands over at once, and batches that wait for a worker.
PIECE, WAITING = 64, 64

T = TypeVar("T")
# Of one target, by its place among them: a shard's number and its entry in the manifest.
Made = tuple[int, int, dict[str, Any]]


class _Shard(NamedTuple):
    """What was made of a shard: activations [contexts, context_size, d_model] by target."""

    number: int
    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    activations: dict[int, Tensor]
    batch_size: int


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
        workers(model) as (pool, n_workers),
    ):

        def chosen() -> int:
            return batch_size or _batch_size(model, contexts, targets, lengths, pool, n_workers)

        size = on_every(ranks, lambda: chosen() if ranks.first else 0)[0]
        bar.set_postfix_str(f"{size} contexts a pass")
        bar.unpause()  # the search is no part of the rate
        filling = _Filling(model, targets, lengths, size, ranks, pool, writer, bar)
        filling.may_shrink = batch_size is None
        try:
            read = prefetched(_pieces(contexts()), ahead=1 + max(lengths) // PIECE)
            stream = chain.from_iterable(stack.enter_context(closing(read)))
            for first in range(0, len(lengths), ranks.size):
                if not filling.turn(stream, first):
                    break
            filling.turn(iter(()), len(lengths))
        except BaseException:
            filling.rescue()
            raise


def _pieces(contexts: Iterator[Context]) -> Iterator[list[Context]]:
    ends = False
    while not ends:
        piece: list[Context] = []
        try:
            piece.extend(islice(contexts, PIECE))  # keeps what came before an error
            ends = len(piece) < PIECE
        finally:
            if piece:
                yield piece


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
    pool: Executor,
    n_workers: int,
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
        return found_batch_size(one_pass, some, pool, n_workers, model.device.type)


class _Filling:
    """The state of `fill`: what is being written, and the batch size, which can shrink."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[Target],
        lengths: Sequence[int],
        size: int,
        ranks: Ranks,
        pool: Executor,
        writer: Executor,
        bar: Any,
    ):
        self._model, self._targets, self._lengths = model, targets, lengths
        self._size, self._ranks, self._bar = size, ranks, bar
        self._pool, self._writer = pool, writer
        self._context_size: int = targets[0].about["context_size"]
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

    def _turn(self, stream: Iterator[Context], first: int) -> tuple[list[Made], bool]:
        numbers = range(first, min(first + self._ranks.size, len(self._lengths)))
        goes_on, made = True, None
        for number in numbers:
            some = islice(stream, self._lengths[number])
            if number % self._ranks.size == self._ranks.rank:
                made = self._made(number, some)
                n_read = len(made.tokens)
            else:
                n_read = len(list(some))
                self._bar.update(n_read * self._context_size)
            goes_on = n_read == self._lengths[number]
        written = [(at, number, future.result()) for at, number, future in self._writing]
        self._writing = []
        if made is not None:
            for at, x in made.activations.items():
                future = self._writer.submit(self._write, at, made, x)
                self._writing.append((at, made.number, future))
        return written, goes_on

    def _write(self, at: int, made: _Shard, x: Tensor) -> dict[str, Any]:
        about = self._targets[at].about
        batch = ContextBatch(made.tokens, made.documents, x, self._first_contexts[made.number])
        tensors = shard_tensors(batch, about["made_from"].get("special_ids", []))
        entry = write_shard(self._targets[at].folder, made.number, tensors)
        return entry | {"batch_size": made.batch_size}

    def _made(self, number: int, some: Iterator[Context]) -> _Shard:
        lack = [at for at, target in enumerate(self._targets) if target.lacks(number)]
        contexts: list[Context] = []
        # A shard that was there, here or at another point, keeps its batch size.
        before = [t.entries[number] for t in self._targets if number < len(t.entries)]
        size = int(before[0]["batch_size"]) if before else self._size
        found: list[Tensor] = []
        while lack:
            kept: list[Context] = []
            try:
                found = self._read(number, chain(contexts, some), lack, size, kept)
                contexts = kept
                break
            except torch.OutOfMemoryError:
                if not self.may_shrink or size == 1:
                    raise
                contexts = kept
            # From the shard's first context on, so that a shard has one batch size.
            size = self._size = size // 2
            self._bar.set_postfix_str(f"{size} contexts a pass")
        if not lack:
            contexts = list(some)
            self._bar.initial += len(contexts) * self._context_size  # so the rate is the model's
            self._bar.update(len(contexts) * self._context_size)
        shape = len(contexts), self._context_size
        tokens, documents = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for i, context in enumerate(contexts):
            tokens[i], documents[i] = context.tokens, context.documents
        check_same_text(tokens, self._targets, number)
        made = dict(zip(lack, found, strict=True)) if contexts else {}
        return _Shard(number, tokens, documents, made, size)

    def _read(
        self,
        number: int,
        some: Iterator[Context],
        lack: list[int],
        size: int,
        kept: list[Context],
    ) -> list[Tensor]:
        """Activations of a shard's contexts, put into `kept`, at each point, as they are stored."""
        about = self._targets[0].about
        dtype = DTYPES[about["dtype"]]
        shape = self._lengths[number], self._context_size, about["d_model"]
        stored = [torch.empty(shape, dtype=dtype) for _ in lack]
        points = [self._targets[at].point for at in lack]
        first = self._first_contexts[number]
        begun = self._bar.n

        def read(at: int, batch: list[Context]) -> int:
            for point, x, out in zip(points, one_pass(batch, first + at), stored, strict=True):
                out[at : at + len(batch)] = rounded(x, dtype, point)
            return len(batch)

        running: deque[Future[int]] = deque()
        try:
            with passing(self._model, points) as one_pass:
                while batch := list(islice(some, size)):
                    running.append(self._pool.submit(read, len(kept), batch))
                    kept += batch
                    while running and (running[0].done() or len(running) > WAITING):
                        self._bar.update(running.popleft().result() * self._context_size)
                while running:
                    self._bar.update(running.popleft().result() * self._context_size)
        except BaseException as error:
            for future in running:
                future.cancel()
            wait(running)
            if isinstance(error, torch.OutOfMemoryError):
                kept += some
                self._bar.update(begun - self._bar.n)
            raise
        return [out[: len(kept)] for out in stored]
