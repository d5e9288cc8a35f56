"""What a steer did: positions edited, activations before and after, the size of the change.

Numbers stay on the device while the model runs (no synchronising step by step) and are added up
every so often; reading the receipt brings them over.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saesteer.core.tokens import Tokens

# Prompts for which the edited positions themselves are kept, and not only their number.
KEPT = 16
# Forward passes noted down before they are added up, each with an activation of at most so many
# numbers; of larger ones the norms alone.
_PENDING, _SMALL = 64, 2**17


@dataclass(frozen=True)
class EditReceipt:
    """What one edit did, over all forward passes of its context.

    Rows are those that passed through the model: beams and return sequences are rows of their own.
    Means and maxima are over the edited positions, each counted once (also where `generate` runs
    without a cache and computes them again); None where there were none.
    """

    edit: str
    counts: list[list[int]]
    """Edited positions: of each prompt (in order), of each row."""
    positions: list[list[list[int]]]
    """Of the first 16 prompts, of each row: the edited positions in its prompt, counted among the
    row's tokens that are not padding."""
    n_eligible: int
    """Positions that it was for; more than n_edited where a condition didn't hold there."""
    n_edited: int
    n_changed: int
    """Positions where it made a difference: where a cap or floor bound, say."""
    relative_size: float | None
    """Mean of ‖Δ‖ / ‖x‖, Δ being this edit's own change; edits of one SAE share theirs."""
    before_mean: float | None = None
    before_max: float | None = None
    after_mean: float | None = None
    after_max: float | None = None
    """Activation of a clamped feature in the SAE's code, before the clamp and put in its place; or
    the projection on a direction, before and after."""
    row: int | None = None
    """The one row of the batch that it was for; None: all."""


class Pass(NamedTuple):
    """One forward pass as an edit saw it.

    eligible: the tokens it is for; chosen: those of them on which its condition held; bool
    [batch, seq], None for all. x: the activation [batch, seq, d]. change: Δ [batch, seq, d], or
    its norm, 0-dim, where it is everywhere the same. before, after: readings [batch, seq, n] of
    features, this edit's at `column`.
    """

    tokens: Tokens
    eligible: Tensor | None
    chosen: Tensor | None
    x: Tensor
    change: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    column: int = 0


class TokenTrace(NamedTuple):
    """One token of a steered text: its id (None where unknown), whether it was edited, readings."""

    id: int | None
    edited: bool
    before: float | None
    after: float | None


class Record:
    """Collects what one edit does while the model runs. row: the one row it is for, or None."""

    def __init__(self, edit: str, row: int | None = None) -> None:
        self.edit, self.row = edit, row
        self._pending: list[Pass] = []
        # By prompt. A pass that stopped before it came to the edit isn't in it.
        self._counts: dict[int, Tensor] = {}  # [batch]
        self._eligible: dict[int, Tensor] = {}  # [batch]
        self._rows: dict[int, list[int]] = {}  # rows of the batch that it is for
        self._positions: dict[int, list[list[int]]] = {}
        self._traces: dict[int, list[list[TokenTrace]]] = {}
        self._sums = torch.zeros(5, dtype=torch.float64)  # as in `_totals`
        self._highest = torch.full((2,), -torch.inf, dtype=torch.float64)  # before, after
        self._reads = False

    def note(self, one: Pass) -> None:
        """Take down one forward pass; adding up is put off, so that this costs next to nothing."""
        if one.x.requires_grad or one.x.numel() > _SMALL:
            # What is put off must not keep large activations, or a graph, alive.
            norm = _norm(one.x)[..., None]
            change = one.change if one.change.dim() == 0 else _norm(one.change)[..., None]
            one = one._replace(x=norm, change=change.detach())
        self._pending.append(one)
        if len(self._pending) >= _PENDING:
            self._add_up()

    @property
    def reached(self) -> bool:
        """Whether any forward pass came to the edit."""
        return bool(self._pending or self._counts)

    def rows_untouched(self) -> list[tuple[int, int]]:
        """(prompt, row) of every row that it is for in which it was for not one position."""
        self._add_up()
        return [
            (prompt, row)
            for prompt, counts in self._eligible.items()
            for row, count in enumerate(counts.tolist())
            if count == 0 and row in self._rows[prompt]
        ]

    def summary(self) -> EditReceipt:
        """The receipt so far."""
        self._add_up()
        n, changed, relative, before, after = self._sums.tolist()
        reads = self._reads and n > 0
        return EditReceipt(
            edit=self.edit,
            counts=[counts.tolist() for counts in self._counts.values()],
            positions=list(self._positions.values()),
            n_eligible=int(sum(int(counts.sum()) for counts in self._eligible.values())),
            n_edited=int(n),
            n_changed=int(changed),
            relative_size=relative / n if n else None,
            before_mean=before / n if reads else None,
            before_max=self._highest[0].item() if reads else None,
            after_mean=after / n if reads else None,
            after_max=self._highest[1].item() if reads else None,
            row=self.row,
        )

    def traces(self) -> list[list[list[TokenTrace]]]:
        """Of the first 16 prompts, of each row, every token that passed through, in order."""
        self._add_up()
        return list(self._traces.values())

    def _add_up(self) -> None:
        # Steps of one text are alike and are added up in one go.
        for prompt, group in groupby(self._pending, key=lambda one: one.tokens.prompt_index):
            self._add_prompt(prompt, list(group))
        self._pending.clear()

    def _add_prompt(self, prompt: int, passes: list[Pass]) -> None:
        mine = torch.ones(passes[0].tokens.shape[0], 1, dtype=torch.bool, device=passes[0].x.device)
        if self.row is not None:
            mine = (passes[0].tokens.source_rows == self.row).to(mine.device)[:, None]
        eligible = _joined(passes, [_all(one, one.eligible) for one in passes]) & mine
        chosen = _joined(passes, [_all(one, one.chosen) for one in passes]) & mine
        if prompt in self._counts:
            self._counts[prompt] = self._counts[prompt] + chosen.sum(1)
            self._eligible[prompt] = self._eligible[prompt] + eligible.sum(1)
        else:
            self._counts[prompt], self._eligible[prompt] = chosen.sum(1), eligible.sum(1)
            self._rows[prompt] = mine[:, 0].nonzero()[:, 0].tolist()
            if len(self._counts) <= KEPT:
                self._positions[prompt] = [[] for _ in mine]
                self._traces[prompt] = [[] for _ in mine]
        size = passes[0].change
        if size.dim() > 0:
            size = _norms(passes, [one.change for one in passes])
        norm = _norms(passes, [one.x for one in passes])
        relative = (size / norm.clamp_min(1e-12))[chosen]
        totals = [chosen.sum(), (relative > 0).sum(), relative.sum(dtype=torch.float64)]
        before = after = None
        if passes[0].before is not None:
            self._reads = True
            before = _joined(passes, [_column(one, one.before) for one in passes])
            after = _joined(passes, [_column(one, one.after) for one in passes])
            was, now = before[chosen].double(), after[chosen].double()
            totals = [totals[0], (was != now).sum(), totals[2], was.sum(), now.sum()]
            if was.numel():
                highest = torch.stack([was.max(), now.max()]).cpu()
                self._highest = torch.maximum(self._highest, highest)
        self._sums[: len(totals)] += torch.stack([t.double() for t in totals]).cpu()
        if prompt in self._positions:
            for one in passes:
                self._keep_positions(prompt, one, mine)
            self._keep_trace(prompt, passes, chosen, before, after)

    def _keep_positions(self, prompt: int, one: Pass, mine: Tensor) -> None:
        tokens, new = one.tokens, one.tokens.first_new
        if tokens.prompt_length is not None and tokens.past_length + new >= tokens.prompt_length:
            return  # all generated
        inside = (_all(one, one.chosen) & mine & ~tokens.is_generated)[:, new:]
        for row, (positions, here) in enumerate(
            zip(tokens.positions[:, new:], inside, strict=True)
        ):
            self._positions[prompt][row] += positions[here].tolist()

    def _keep_trace(
        self,
        prompt: int,
        passes: list[Pass],
        chosen: Tensor,
        before: Tensor | None,
        after: Tensor | None,
    ) -> None:
        known = all(one.tokens.input_ids is not None for one in passes)
        ids = _joined(passes, [one.tokens.input_ids for one in passes]) if known else None
        padding = _joined(passes, [one.tokens.is_padding for one in passes]).tolist()
        columns = [
            [[None] * chosen.shape[1]] * len(chosen) if each is None else each.tolist()
            for each in (ids, chosen, before, after)
        ]
        for row, trace in enumerate(self._traces[prompt]):
            tokens = zip(*(each[row] for each in columns), strict=True)
            trace += [
                TokenTrace(*token)
                for token, padded in zip(tokens, padding[row], strict=True)
                if not padded
            ]


def _all(one: Pass, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask
    return torch.ones(one.tokens.shape, dtype=torch.bool, device=one.x.device)


def _column(one: Pass, reading: Tensor | None) -> Tensor:
    assert reading is not None
    return reading[..., one.column]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32)


def _norms(passes: list[Pass], parts: list[Tensor]) -> Tensor:
    """‖·‖ over d of parts [batch, seq, d]; of those that are norms already d is 1."""
    if len({part.shape[-1] for part in parts}) == 1:
        return _norm(_joined(passes, parts))
    return _joined(passes, [_norm(part) for part in parts])


def _joined(passes: list[Pass], parts: list[Any]) -> Tensor:
    """Parts [batch, seq, ...], one a pass, side by side; what a pass saw again is left out."""
    pairs = zip(passes, parts, strict=True)
    return torch.cat([part[:, one.tokens.first_new :] for one, part in pairs], 1)


class Receipt:
    """What a steer did, edit by edit. It fills while the context runs and can be read any time."""

    def __init__(self, records: list[Record], passes: Callable[[], tuple[int, int]]) -> None:
        self._records = records
        self._passes = passes

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self._passes()[0]

    @property
    def prompts(self) -> int:
        """Prompts so far: `generate` calls, and bare forward passes with an empty cache."""
        return self._passes()[1]

    def traces(self, edit: int = 0) -> list[list[list[TokenTrace]]]:
        """What the edit of that number did token by token: of the first 16 prompts, of each row."""
        return self._records[edit].traces()

    @property
    def edits(self) -> tuple[EditReceipt, ...]:
        """One receipt an edit, in the order written."""
        return tuple(record.summary() for record in self._records)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        edits = [asdict(edit) for edit in self.edits]
        return {"forwards": self.forwards, "prompts": self.prompts, "edits": edits}

    def __str__(self) -> str:
        header = ("edit", "positions", "changed", "before", "after", "‖Δ‖/‖x‖")
        rows = [header, *(_cells(edit) for edit in self.edits)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        right = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *cells[1:]])
            for row, cells in zip(rows, right, strict=True)
        )


def _cells(edit: EditReceipt) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return (
        edit.edit,
        str(edit.n_edited),
        str(edit.n_changed),
        number(edit.before_mean),
        number(edit.after_mean),
        number(edit.relative_size),
    )
