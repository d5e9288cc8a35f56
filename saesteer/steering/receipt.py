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
POSITIONS_KEPT = 16
# Forward passes noted down before they are added up.
_PENDING = 64


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
    n_edited: int
    n_changed: int
    """Positions where it made a difference: where a cap or floor bound, say."""
    relative_size: float | None
    """Mean of ‖Δ‖ / ‖x‖, Δ being this edit's own change; edits of one SAE share theirs."""
    before_mean: float | None = None
    before_max: float | None = None
    after_mean: float | None = None
    after_max: float | None = None
    """Activation of a clamped feature in the SAE's code, before the clamp and put in its place."""


class _Pass(NamedTuple):
    """One forward pass as an edit saw it, in the terms of `Record.note`."""

    tokens: Tokens
    chosen: Tensor
    size: Tensor  # ‖Δ‖
    norm: Tensor  # ‖x‖
    before: Tensor | None
    after: Tensor | None
    column: int


class Record:
    """Collects what one edit does while the model runs."""

    def __init__(self, edit: str) -> None:
        self.edit = edit
        self._pending: list[_Pass] = []
        # By prompt. A pass that stopped before it came to the edit isn't in it.
        self._counts: dict[int, Tensor] = {}  # [batch]
        self._positions: dict[int, list[list[int]]] = {}
        self._sums = torch.zeros(5, dtype=torch.float64)  # as in `_totals`
        self._highest = torch.full((2,), -torch.inf, dtype=torch.float64)  # before, after
        self._of_feature = False

    def note(
        self,
        tokens: Tokens,
        chosen: Tensor,
        size: Tensor,
        norm: Tensor,
        before: Tensor | None = None,
        after: Tensor | None = None,
        column: int = 0,
    ) -> None:
        """Take down one forward pass; adding up is put off, so that this costs next to nothing.

        chosen: bool [batch, seq]. size: ‖Δ‖, a scalar or [batch, seq]. norm: ‖x‖ [batch, seq].
        before, after: activations [batch, seq, n] of clamped features, this one's at `column`.
        """
        self._pending.append(_Pass(tokens, chosen, size, norm, before, after, column))
        if len(self._pending) >= _PENDING:
            self._add_up()

    @property
    def reached(self) -> bool:
        """Whether any forward pass came to the edit."""
        return bool(self._pending or self._counts)

    def rows_untouched(self) -> list[tuple[int, int]]:
        """(prompt, row) of every row in which not one position was chosen."""
        self._add_up()
        return [
            (prompt, row)
            for prompt, counts in self._counts.items()
            for row, count in enumerate(counts.tolist())
            if count == 0
        ]

    def summary(self) -> EditReceipt:
        """The receipt so far."""
        self._add_up()
        n, changed, relative, before, after = self._sums.tolist()
        feature = self._of_feature and n > 0
        return EditReceipt(
            edit=self.edit,
            counts=[counts.tolist() for counts in self._counts.values()],
            positions=list(self._positions.values()),
            n_edited=int(n),
            n_changed=int(changed),
            relative_size=relative / n if n else None,
            before_mean=before / n if feature else None,
            before_max=self._highest[0].item() if feature else None,
            after_mean=after / n if feature else None,
            after_max=self._highest[1].item() if feature else None,
        )

    def _add_up(self) -> None:
        # Steps of one text are alike and are added up in one go.
        for prompt, group in groupby(self._pending, key=lambda one: one.tokens.prompt_index):
            self._add_prompt(prompt, list(group))
        self._pending.clear()

    def _add_prompt(self, prompt: int, passes: list[_Pass]) -> None:
        chosen = _joined(passes, "chosen")
        count = chosen.sum(1)
        if prompt in self._counts:
            self._counts[prompt] = self._counts[prompt] + count
        else:
            self._counts[prompt] = count
            if len(self._counts) <= POSITIONS_KEPT:
                self._positions[prompt] = [[] for _ in count]
        if prompt in self._positions:
            for one in passes:
                self._keep_positions(prompt, one)
        size = passes[0].size if passes[0].size.dim() == 0 else _joined(passes, "size")
        relative = (size / _joined(passes, "norm").clamp_min(1e-12))[chosen]
        totals = [chosen.sum(), (relative > 0).sum(), relative.sum(dtype=torch.float64)]
        if passes[0].before is not None:
            self._of_feature = True
            column = passes[0].column
            before = _joined(passes, "before")[..., column][chosen].double()
            after = _joined(passes, "after")[..., column][chosen].double()
            totals = [totals[0], (before != after).sum(), totals[2], before.sum(), after.sum()]
            if before.numel():
                highest = torch.stack([before.max(), after.max()]).cpu()
                self._highest = torch.maximum(self._highest, highest)
        self._sums[: len(totals)] += torch.stack([t.double() for t in totals]).cpu()

    def _keep_positions(self, prompt: int, one: _Pass) -> None:
        tokens, new = one.tokens, one.tokens.first_new
        if tokens.prompt_length is not None and tokens.past_length + new >= tokens.prompt_length:
            return  # all generated
        inside = (one.chosen & ~tokens.is_generated)[:, new:]
        for row, (positions, here) in enumerate(
            zip(tokens.positions[:, new:], inside, strict=True)
        ):
            self._positions[prompt][row] += positions[here].tolist()


def _joined(passes: list[_Pass], name: str) -> Tensor:
    """One quantity of several passes side by side [batch, all their new tokens, ...]."""
    parts = []
    for one in passes:
        part: Tensor = getattr(one, name)
        parts.append(part[:, one.tokens.first_new :] if one.tokens.first_new else part)
    return torch.cat(parts, 1)


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
