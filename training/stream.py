"""Batches of activations for training: from a cache in any order, or straight from the model.

Both serve a step's rows by the step's number alone, so that a run that was killed goes on with what
an unbroken one would have seen.
"""

import hashlib
import itertools
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from saesteer.errors import TextError, TrainingError
from saesteer.training.packing import Context
from saesteer.training.ranks import ALONE, Ranks
from saesteer.training.rows import Rows, batches, spread

# Rows from which means and norms are estimated where nobody counted them.
SAMPLE = 2**15

T = TypeVar("T")


class Batch(NamedTuple):
    """x: float32 [n, d_in]; target: [n, d_out], x itself where an autoencoder is trained."""

    x: Tensor
    target: Tensor


class Stream(Protocol):
    """Where a training's activations come from.

    Attributes:
        batch_size: rows of a step, over all ranks.
        sample: some training rows, the same on every rank.
        identity: what the activations are, JSON; a checkpoint made with others is refused.
    """

    batch_size: int
    sample: Batch
    identity: dict[str, Any]

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, this rank's rows) of steps start … stop - 1."""
        ...

    def held_out(self, most: int) -> Iterator[Tensor]:
        """At most so many held-out rows of the input, [n, d_in] at a time, all ranks the same."""
        ...


class CachedStream:
    """Rows of cached activations; every epoch is a true permutation of all tokens, by seed.

    Args:
        shards: one cache, or two whose rows are the same tokens: input and target.
        train_rows, held_out_rows: int64 row indices, from `rows.split_rows`.
        ranks: those that share each batch by rows.

    Raises:
        TrainingError: there are fewer rows than one batch.
    """

    def __init__(
        self, shards: tuple[Rows, ...], train_rows: np.ndarray, held_out_rows: np.ndarray, *,
        batch_size: int, seed: int = 0, ranks: Ranks = ALONE,
    ):  # fmt: skip
        if len(train_rows) < batch_size:
            raise TrainingError(
                f"{len(train_rows)} training tokens are fewer than one batch of {batch_size}; "
                "cache more tokens or use a smaller batch"
            )
        self._shards, self._seed, self._ranks = shards, seed, ranks
        self._train_rows, self._held_out_rows = train_rows, held_out_rows
        self.batch_size = batch_size
        self.sample = self._batch(spread(train_rows, SAMPLE))
        self.identity = {
            "rows": _hash(train_rows),
            "activations": _hash(self.sample.x[:1024].numpy()),
            "order": seed,
        }

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """As in `Stream`."""
        for step, rows in batches(self._train_rows, self.batch_size, self._seed, start, stop):
            yield step, self._batch(rows[self._ranks.rank :: self._ranks.size])

    def held_out(self, most: int) -> Iterator[Tensor]:
        """As in `Stream`."""
        rows = spread(self._held_out_rows, most)
        for first in range(0, len(rows), self.batch_size):
            yield self._shards[0].rows(rows[first : first + self.batch_size])

    def _batch(self, rows: np.ndarray) -> Batch:
        x, *target = (shards.rows(rows) for shards in self._shards)
        return Batch(x, target[0] if target else x)


class LiveStream:
    """Rows straight from the model, shuffled in a rolling buffer; nothing is written to disk.

    The text comes in blocks of contexts, over and over. A block's rows are dealt into two halves at
    random; what is served together, shuffled, is one block's second half with the next one's first.
    So neighbours part, and what is served at any step depends on two blocks of text only: a killed
    run goes on there, and runs the model on no text before.

    Args:
        contexts: makes the stream of contexts anew, the same each time.
        read: contexts → their activations [n · context_size, d] at each point (input, and target
            where it differs).
        keep: tokens [n, context_size] → which of them are used, bool.
        block: contexts a block.
        n_held_out: the first so many contexts, never trained on; `held_out` gives the first half
            of them, the others are evaluation's.
        ranks: those that share each batch by rows; each reads its own contexts of a block.
        text: what the text is, JSON: part of the identity.

    Raises:
        TextError: the text is shorter than the contexts held out and one block.
    """

    def __init__(
        self, contexts: Callable[[], Iterator[Context]],
        read: Callable[[list[Context]], tuple[Tensor, ...]],
        *, keep: Callable[[np.ndarray], np.ndarray], block: int, n_held_out: int,
        batch_size: int, seed: int = 0, ranks: Ranks = ALONE,
        text: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self._contexts, self._read, self._keep = contexts, read, keep
        self._block, self._n_held_out = block, n_held_out
        self._seed, self._ranks = seed, ranks
        self._second_half: tuple[int, Batch] | None = None
        self.batch_size = batch_size
        first = list(itertools.islice(contexts(), n_held_out + block))
        if len(first) < n_held_out + block:
            raise TextError(
                f"the text holds {len(first)} contexts, fewer than the {n_held_out} to hold out "
                f"and the buffer's {block}; give more text, or train from a cache"
            )
        self._held_out = self._rows(first[: max(1, n_held_out // 2)]).x
        self.sample = self._rows(first[n_held_out:][: max(1, SAMPLE // len(first[0].tokens))])
        self.identity = {
            "activations": _hash(self.sample.x[:1024].numpy()),
            "text": dict(text or {}),
            "block": block,
            "held_out": n_held_out,
            "ranks": ranks.size,
            "order": seed,
        }

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """As in `Stream`."""
        mine = self.batch_size // self._ranks.size
        step = 0
        before: list[Context] = []
        for number, block in enumerate(self._blocks()):
            counts = [
                self._count(before, number - 1)[r][1] + self._count(block, number)[r][0]
                for r in range(self._ranks.size)
            ]
            steps = min(counts) // mine
            if step + steps > start:
                mix = self._mix(before, block, number)
                for at in range(max(start - step, 0), min(steps, stop - step)):
                    here = slice(at * mine, (at + 1) * mine)
                    x = mix.x[here]
                    yield step + at, Batch(x, x if mix.target is mix.x else mix.target[here])
            elif number and not steps and not step:
                raise TrainingError(
                    f"a buffer of {self._block} contexts holds fewer tokens than one batch of "
                    f"{self.batch_size}; use a larger buffer or a smaller batch"
                )
            if number == 1 and min(counts) > 1.1 * steps * mine:
                warnings.warn(
                    f"a buffer of {self._block} contexts fills {steps} batches a mix, and what is "
                    "left over is not used; a larger buffer (rows.buffer) wastes less",
                    stacklevel=2,
                )
            step += steps
            before = block
            if step >= stop:
                return

    def held_out(self, most: int) -> Iterator[Tensor]:
        """As in `Stream`."""
        yield from self._held_out[:most].split(self.batch_size)

    def _blocks(self) -> Iterator[list[Context]]:
        while True:
            text = itertools.islice(self._contexts(), self._n_held_out, None)
            while block := list(itertools.islice(text, self._block)):
                if len(block) >= self._ranks.size:  # each rank needs one of its contexts
                    yield block

    def _count(self, block: list[Context], number: int) -> list[tuple[int, int]]:
        """How many of a block's rows each rank deals into the first half, and into the second."""
        halves = []
        for rank in range(self._ranks.size):
            part = block[rank :: self._ranks.size]
            n = int(self._keep(np.stack([c.tokens for c in part])).sum()) if part else 0
            halves.append((n - n // 2, n // 2))
        return halves

    def _mix(self, before: list[Context], block: list[Context], number: int) -> Batch:
        kept = self._second_half
        self._second_half = None
        if before and (kept is None or kept[0] != number - 1):  # here a killed run goes on
            kept = (number - 1, self._halves(before, number - 1)[1])
        first, second = self._halves(block, number)
        self._second_half = (number, second)
        parts = [first] if kept is None else [kept[1], first]
        alike = first.target is first.x
        x = torch.cat([part.x for part in parts])
        order = torch.from_numpy(self._random(number, 1).permutation(len(x)))
        x = x[order]
        return Batch(x, x if alike else torch.cat([part.target for part in parts])[order])

    def _halves(self, block: list[Context], number: int) -> tuple[Batch, Batch]:
        rows = self._rows(block[self._ranks.rank :: self._ranks.size])
        order = torch.from_numpy(self._random(number, 0).permutation(len(rows.x)))
        first, second = order.split([len(order) - len(order) // 2, len(order) // 2])

        def part(at: Tensor) -> Batch:
            x = rows.x[at]
            return Batch(x, x if rows.target is rows.x else rows.target[at])

        return part(first), part(second)

    def _random(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, number, purpose, self._ranks.rank])

    def _rows(self, contexts: list[Context]) -> Batch:
        keep = torch.from_numpy(self._keep(np.stack([c.tokens for c in contexts]))).reshape(-1)
        x, *target = (each[keep].float() for each in self._read(contexts))
        return Batch(x, target[0] if target else x)


def prefetched(items: Iterator[T], ahead: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread while the ones before are used."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join()


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
