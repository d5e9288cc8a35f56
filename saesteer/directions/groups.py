"""Pairs that ask the same stay together: whole groups are held out, never a part of one.

Of near-identical pairs on both sides of a split the one half tells the labels of the other, and
what is called held out isn't.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from saesteer.directions.pair_checks import stems_of
from saesteer.directions.pairs import Pair


def groups_of(pairs: Iterable[Pair]) -> list[int]:
    """For each pair the number of its group: pairs whose prompts have one `stem` are one group.

    Of pairs without a prompt those are one group that have the same two answers.
    """
    return numbered(stems_of([pair]) for pair in pairs)


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """For each key the place at which it came among the different ones, from 0."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def split(
    groups: Sequence[int], wanted: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Rows of whole groups, about `wanted` of them, and the rows of all other groups.

    Groups are drawn one after the other and taken as far as they fit; where none does, the smallest
    is taken. Both come in the order of the draw.
    """
    order = rng.permutation(max(groups) + 1).tolist()
    rows: list[list[int]] = [[] for _ in order]
    for row, group in enumerate(groups):
        rows[group].append(row)
    taken: list[int] = []
    left: list[int] = []
    for group in order:
        fits = len(taken) + len(rows[group]) <= wanted
        (taken if fits else left).extend(rows[group])
    if not taken:
        taken = min((rows[group] for group in order), key=len)
        left = [row for row in left if row not in set(taken)]
    return taken, left


def folds(
    groups: Sequence[int], most: int, rng: np.random.Generator
) -> tuple[int, NDArray[np.int64]]:
    """How many folds, and for each pair its fold, from 0.

    No more than `most`, and no more than leaves two groups a fold; 0 or 1 is none to hold out.
    """
    n = max(groups) + 1
    count = min(most, n // 2)
    if count < 2:
        return count, np.zeros(len(groups), np.int64)
    fold = (np.arange(n) % count)[rng.permutation(n)]
    return count, fold[np.asarray(groups)]
