"""Pairs held out: drawn from those that an arm is made of, or read from a file of their own."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from saesteer.directions.groups import groups_of, numbered, split
from saesteer.directions.pair_checks import check
from saesteer.directions.pairs import Pair, parse_pairs, problems
from saesteer.errors import PairsError

HELD_OUT = 0.25
"""The share of the pairs that is held out where no others are given."""


def hold_out(pairs: Sequence[Pair], seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The pairs to make an arm of, and a quarter of them, drawn by the seed, that is held out.

    Pairs that ask the same are on one side of the split, unless all do.

    Raises:
        PairsError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise PairsError(
            f"of {len(pairs)} pair none can be held out; give more pairs, or others to hold out "
            "(--validation FILE)"
        )
    groups = groups_of(pairs)
    if not any(groups):
        groups = numbered(pairs)
    # A stream of its own: methods, the noise and the folds draw from `seed` too.
    rng = np.random.default_rng([seed, 3])
    held, rest = split(groups, max(1, round(HELD_OUT * len(pairs))), rng)
    return tuple(pairs[i] for i in sorted(rest)), tuple(pairs[i] for i in held)


def check_apart(pairs: Sequence[Pair], validation: Sequence[Pair]) -> None:
    """PairsError where a pair to fit on is among those to measure on, or asks the same."""
    for finding in check(pairs, other=validation):
        if finding.kind.startswith("leaked"):
            raise PairsError(f"the pairs and those of --validation: {finding}")


def read_held_out(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Pair, ...]:
    """Pairs to measure on, each once, as `read_pairs` reads them; few of them are no fault.

    Raises:
        PairsError: as `read_pairs`.
    """
    found = list(parse_pairs(source, tokenizer))
    for where, pair in found:
        for problem in problems(pair):
            raise PairsError(f"{where}: {problem}")
    return tuple(dict.fromkeys(pair for _, pair in found))
