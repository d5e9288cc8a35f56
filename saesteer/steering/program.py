"""Edits made ready to run: those at one hook point become steps, in the order written.

One step for each run of clamps of the same SAE, whose activations are all read from the same
unedited x, and one for each other edit. Where rows have lists of their own, steps of several rows
that are alike become one, so that a sweep over sixty-four rows costs what one edit costs.
"""

from collections.abc import Sequence

from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.tokens import Tokens
from saesteer.steering.clamps import ClampStep
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.steps import AddStep, MapStep, Placed, Shared, Step, alike


def compile_point(point: HookPoint, placed: Sequence[Placed], shared: Shared) -> Step:
    """One function x [batch, seq, d], tokens → x for all edits at one place, in order.

    What is only read there is read first.
    """
    steps = [_step(group, shared) for group in _groups(placed)]
    readers = shared.readers.setdefault(point, [])

    def run(x: Tensor, tokens: Tokens) -> Tensor:
        for read in readers:
            read(x, tokens)
        for step in steps:
            x = step(x, tokens)
        return x

    return run


def _step(group: Sequence[Placed], shared: Shared) -> Step:
    if isinstance(group[0].edit, Add):
        return AddStep(group, shared)
    if isinstance(group[0].edit, Clamp):
        return ClampStep(group, shared)
    return MapStep(group[0], shared)


def _groups(placed: Sequence[Placed]) -> list[list[Placed]]:
    """What becomes a step: the n-th runs of all rows, those that can be together."""
    by_row: dict[int | None, list[list[Placed]]] = {}
    for one in placed:
        runs = by_row.setdefault(one.row, [])
        if runs and isinstance(one.edit, Clamp) and _join(runs[-1][0].edit, one.edit):
            runs[-1].append(one)
        else:
            runs.append([one])
    groups: list[list[Placed]] = []
    for n in range(max(map(len, by_row.values()), default=0)):
        begun = len(groups)
        for runs in by_row.values():
            if n >= len(runs):
                continue
            fitting = (g for g in groups[begun:] if _join(g[0].edit, runs[n][0].edit))
            group = next(fitting, None)
            if group is None:
                groups.append(list(runs[n]))
            else:
                group += runs[n]
    return groups


def _join(first: Edit, second: Edit) -> bool:
    """Whether two edits, of one run or of different rows, can be one step."""
    if isinstance(first, Add) and isinstance(second, Add):
        return alike(first, second)
    if isinstance(first, Clamp) and isinstance(second, Clamp):
        a, b = first.sae, second.sae
        # One SAE loaded twice is still one SAE.
        same = a is b or (a.W_enc.shape == b.W_enc.shape and a.hash == b.hash)
        return same and first.keep_norm == second.keep_norm
    return False
