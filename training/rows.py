"""Which cached activations a run trains on, which are held out, and in which order they come."""

import math
from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from saesteer.errors import TrainingError


class Rows(Protocol):
    """Random access to cached activations; `core.shards.Shards` is one."""

    def rows(self, indices: np.ndarray) -> Tensor:
        """float32 [n, d] of the rows `indices` [n] (context · context_size + position)."""
        ...


def first_held_out(contexts: int, held_out: float) -> int:
    """The first context held out, of the last `held_out` (a fraction); one at least is."""
    return min(contexts - 1, max(1, contexts - math.ceil(contexts * held_out)))


def first_evaluated(contexts: int, held_out: float) -> int:
    """The first context of the second half of those held out, which evaluation uses.

    On the first half thresholds are calibrated; a single context serves both.
    """
    first = first_held_out(contexts, held_out)
    return first + (contexts - first) // 2


def split_rows(
    tokens: np.ndarray, special_ids: Collection[int], held_out: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows to train on, and of those to calibrate on: whole contexts.

    The last contexts are held out: the first half of them (one at least) is the latter, and the
    others are nobody's but evaluation's.

    Args:
        tokens: int [contexts, context_size].
        special_ids: tokens whose rows are left out of both (BOS, EOS, pad).
        held_out: fraction of contexts held out; one at least.

    Raises:
        TrainingError: fewer than two contexts, or no row is left.
    """
    contexts, size = tokens.shape
    if contexts < 2:
        raise TrainingError(
            f"only {contexts} context of activations: training needs one to train on and one held "
            "out; cache more tokens or use a shorter context"
        )
    first = first_held_out(contexts, held_out)
    last = max(first + 1, first_evaluated(contexts, held_out))
    plain = ~np.isin(np.asarray(tokens), np.fromiter(special_ids, dtype=np.int64)).reshape(-1)
    train, rest = plain[: first * size].nonzero()[0], plain[first * size : last * size].nonzero()[0]
    if not len(train) or not len(rest):
        raise TrainingError("every cached token is a special token; cache text with words in it")
    return train, rest + first * size


def without_outliers(rows: np.ndarray, norms: np.ndarray, most: float) -> np.ndarray:
    """Those of the rows whose norm is at most `most` times the median of all of them.

    A few tokens (a context's first, delimiters) have norms a hundred times the others' in many
    models, and would rule the loss. norms: [contexts, context_size], of every row.

    Raises:
        TrainingError: `most` is below 1, which would leave out half of the rows and more.
    """
    if not most >= 1:
        raise TrainingError(f"rows.max_norm is {most}; expected 1 or more, such as 10")
    those = np.asarray(norms).reshape(-1)[rows]
    return rows[those <= most * np.median(those)]


def batches(
    rows: np.ndarray, batch_size: int, seed: int, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Steps start … stop - 1 with their rows; an epoch ends where no whole batch is left."""
    in_epoch = len(rows) // batch_size
    epoch = -1
    order = np.empty(0, dtype=np.int64)
    for step in range(start, stop):
        if step // in_epoch != epoch:
            epoch = step // in_epoch
            order = np.random.default_rng([seed, epoch]).permutation(rows)
        first = step % in_epoch * batch_size
        # Sorted for the memory map's sake; within a batch the order means nothing.
        yield step, np.sort(order[first : first + batch_size])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]
