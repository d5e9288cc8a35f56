"""Edits at work: each step maps the activation x [batch, seq, d] of a pass to the edited one.

What can be worked out once is, before the model starts. Where nothing is to change, x comes back
to the bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saesteer.core.model import HookPoint
from saesteer.core.tokens import Tokens
from saesteer.steering.conditions import Gate
from saesteer.steering.edits import Add, Affine, Edit, Lean, Project, Rotate, Scope
from saesteer.steering.passes import Pass
from saesteer.steering.positions import Positions
from saesteer.steering.record import Record

Masks = Callable[[Tokens, Positions], Tensor | None]
Step = Callable[[Tensor, Tokens], Tensor]
Reader = Callable[[Tensor, Tokens], None]


@dataclass(frozen=True, eq=False)
class Placed:
    """An edit, and the one row of the batch that it is for (None: all)."""

    edit: Edit
    row: int | None = None

    def __str__(self) -> str:
        return str(self.edit) if self.row is None else f"row {self.row}: {self.edit}"


Records = dict[Placed, tuple[Record, int]]


@dataclass(frozen=True, eq=False)
class Shared:
    """What the steps of one context share.

    masks: the chosen tokens of a pass, for a `Positions`. gates: conditions at work, by their id.
    rows: how many rows have edit lists of their own; 0 where all rows have the same. records: of
    each edit, the record that it is in and its place there; wheres: of equal positions, the one
    object that stands for them; readers: what looks at the activation at a place before the
    edits there: conditions, and the inputs of transcoders. The steps fill all three.
    """

    masks: Masks
    gates: Mapping[int, Gate]
    rows: int
    device: torch.device
    records: Records = field(default_factory=dict)
    wheres: dict[Positions, Positions] = field(default_factory=dict)
    readers: dict[HookPoint, list[Reader]] = field(default_factory=dict)

    def record(self, placed: Sequence[Placed], columns: Sequence[int] | None = None) -> Record:
        """A new record of edits that act at once, which `records` then knows."""
        record = Record([str(one) for one in placed], [one.row for one in placed], columns)
        self.records.update({one: (record, at) for at, one in enumerate(placed)})
        return record


class Chosen:
    """Where edits of one scope act in a pass, their rows apart."""

    def __init__(self, scope: Scope, shared: Shared) -> None:
        # One object for all that are equal, which the masks are then known by.
        self.where = shared.wheres.setdefault(scope.where, scope.where)
        self.schedule, self.keep_norm = scope.schedule, scope.keep_norm
        self._masks = shared.masks
        self._gate = None if scope.when is None else shared.gates[id(scope.when)]

    def masks(self, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
        """The tokens that it is for, and those of them on which its condition holds and its
        schedule isn't 0: bool [batch, seq]; None: all of them."""
        eligible = mask = self._masks(tokens, self.where)
        if self._gate is not None:
            holds = self._gate.holds(tokens)
            mask = holds if mask is None else mask & holds
        if self.schedule is not None:
            on = (self.schedule.factor(tokens) != 0).expand(tokens.shape)
            mask = on if mask is None else mask & on
        return eligible, mask

    def factor(self, tokens: Tokens) -> Tensor | None:
        """What the change is multiplied by: [seq, 1], float32; None: 1."""
        return None if self.schedule is None else self.schedule.factor(tokens)[:, None]

    def finished(self, x: Tensor, change: Tensor) -> Tensor:
        """x + change, in x's dtype, with x's norm where that is to be kept."""
        if not self.keep_norm:
            new = x + change  # a float32 change widens x: one rounding, at the end
            return new if new.dtype == x.dtype else new.to(x.dtype)
        wide = x.float()
        new = wide + change.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        size = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
        # What an edit turned into nothing has no direction to keep a norm in.
        return (new * (norms / size.clamp_min(1e-30)).where(size > 0, 1)).to(x.dtype)


def alike(first: Scope, second: Scope) -> bool:
    """Whether two edits act in the same places, at the same times and as strongly."""
    return (
        first.where == second.where
        and first.when is second.when
        and first.schedule == second.schedule
        and first.keep_norm == second.keep_norm
    )


class AddStep:
    """x + strength · vector where chosen; the edits are alike but for their rows."""

    def __init__(self, placed: Sequence[Placed], shared: Shared) -> None:
        self._chosen = Chosen(placed[0].edit, shared)
        self._record = shared.record(placed)
        changes = []
        for one in placed:
            assert isinstance(one.edit, Add)
            vector = one.edit.vector.to(shared.device, torch.float32)
            changes.append(vector * one.edit.strength)
        if placed[0].row is None:
            self._has: Tensor | None = None
            self._change = changes[0]  # [d]
        else:
            rows = torch.tensor([one.row for one in placed], device=shared.device)
            self._has = torch.zeros(shared.rows, dtype=torch.bool, device=shared.device)
            self._has[rows] = True
            none = changes[0].new_zeros(shared.rows, len(changes[0]))
            self._change = none.index_copy(0, rows, torch.stack(changes))  # [rows, d]
        self._sizes = torch.stack(changes).detach().norm(dim=1)
        # Adding zero isn't always nothing to the bit: -0 + 0 is +0.
        zero = [isinstance(one.edit, Add) and one.edit.strength == 0 for one in placed]
        if self._has is not None:
            for one, nothing in zip(placed, zero, strict=True):
                self._has[one.row] = not nothing
        self._nothing = all(zero)

    def __call__(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self._change.device != x.device:
            self._change = self._change.to(x.device)
            self._sizes = self._sizes.to(x.device)
            self._has = None if self._has is None else self._has.to(x.device)
        eligible, mask = self._chosen.masks(tokens)
        factor = self._chosen.factor(tokens)
        # Everywhere the same, and so known beforehand, but for a schedule or a norm to keep.
        alike = self._nothing or (factor is None and not self._chosen.keep_norm)
        if alike:
            self._record.note(Pass(tokens, eligible, mask, x, self._sizes))
        if self._nothing:
            return x
        noted = mask
        change = self._change
        if self._has is not None:
            rows = tokens.source_rows
            change = change[rows][:, None]
            here = self._has[rows][:, None].expand(tokens.shape)
            mask = here if mask is None else mask & here
        if factor is not None:
            change = change * factor
        new = self._chosen.finished(x, change)
        if not alike:
            self._record.note(Pass(tokens, eligible, noted, x, new - x))
        return new if mask is None else torch.where(mask[..., None], new, x)


class MapStep:
    """A projection, a turn, an affine map or a rotation where chosen; computed in float32."""

    def __init__(self, placed: Placed, shared: Shared) -> None:
        self._placed, self._chosen = placed, Chosen(placed.edit, shared)
        self._record = shared.record([placed], [0])
        edit, device = placed.edit, shared.device
        self._read: Tensor | None = None
        if isinstance(edit, Project | Lean):
            self._read = _unit(edit.vector.to(device, torch.float32))
            self._tensors = [self._read]
        elif isinstance(edit, Affine):
            self._tensors = [t.to(device, torch.float32) for t in (edit.matrix, edit.shift)]
        else:
            assert isinstance(edit, Rotate)
            first = _unit(edit.first.to(device, torch.float32))
            second = edit.second.to(device, torch.float32)
            self._tensors = [first, _unit(second - (second @ first) * first)]

    def __call__(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self._tensors[0].device != x.device:
            self._tensors = [tensor.to(x.device) for tensor in self._tensors]
        wide = x.float()
        change = self._change(wide)
        factor = self._chosen.factor(tokens)
        if factor is not None:
            change = change * factor
        eligible, mask = self._chosen.masks(tokens)
        noted = mask
        if self._placed.row is not None:
            here = (tokens.source_rows == self._placed.row)[:, None].expand(tokens.shape)
            mask = here if mask is None else mask & here
        new = self._chosen.finished(x, change)
        before = after = None
        if self._read is not None:
            read = self._tensors[0].detach()
            before, after = (x.detach().float() @ read)[..., None], (new.detach().float() @ read)
            after = after[..., None]
        self._record.note(Pass(tokens, eligible, noted, x, new - x, before, after))
        return new if mask is None else torch.where(mask[..., None], new, x)

    def _change(self, x: Tensor) -> Tensor:
        edit = self._placed.edit
        if isinstance(edit, Project):
            (unit,) = self._tensors
            return (edit.to - x @ unit)[..., None] * unit
        if isinstance(edit, Lean):
            (unit,) = self._tensors
            if edit.strength == 0:
                return torch.zeros_like(x)
            size = x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            away = -(x / size @ unit)[..., None].clamp(max=0)
            new = x / size + edit.strength * (1 + away) * unit
            return size * new / new.norm(dim=-1, keepdim=True).clamp_min(1e-30) - x
        if isinstance(edit, Affine):
            matrix, shift = self._tensors
            return x @ matrix.T + shift - x
        assert isinstance(edit, Rotate)
        first, second = self._tensors
        along, across = x @ first, x @ second
        cosine, sine = math.cos(edit.angle), math.sin(edit.angle)
        if edit.how == "by":
            turned = along * cosine - across * sine, along * sine + across * cosine
        else:
            length = torch.hypot(along, across)
            turned = length * cosine, length * sine
        return (turned[0] - along)[..., None] * first + (turned[1] - across)[..., None] * second


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()
