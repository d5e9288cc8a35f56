"""What edits do, taken down while the model runs.

Numbers stay on the device (no synchronising step by step) and are added up every so often; reading
them brings them over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saesteer.steering.passes import Pass, by_prompt, joined, mask_of, masks_of, norm, norms_of

# Prompts for which the edited positions themselves are kept, and not only their number.
KEPT = 16
# Forward passes noted down before they are added up, each with an activation of at most so many
# numbers (all together 16 MB in float32); of larger ones the norms alone.
_PENDING, _SMALL = 128, 2**15


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


class TokenTrace(NamedTuple):
    """One token of a steered text: its id (None where unknown), whether it was edited, readings."""

    id: int | None
    edited: bool
    before: float | None
    after: float | None


class Record:
    """Collects what edits that act at once do while the model runs.

    edits: how each is named. rows: the one row of the batch that each is for; None: all. columns:
    which reading of a pass is each one's.
    """

    def __init__(
        self,
        edits: Sequence[str],
        rows: Sequence[int | None],
        columns: Sequence[int] | None = None,
    ) -> None:
        self._edits, self._rows, self._columns = list(edits), list(rows), columns
        self._pending: list[Pass] = []
        # By prompt. A pass that stopped before it came to the edits isn't in it.
        self._mine: dict[int, Tensor] = {}  # bool [n, batch]: the rows that each is for
        self._counts: dict[int, Tensor] = {}  # [n, batch]
        self._eligible: dict[int, Tensor] = {}
        self._positions: dict[int, list[list[int]]] = {}
        self._traced: dict[int, list[_Traced]] = {}
        # changed, ‖Δ‖/‖x‖, before, after by edit; the highest before and after.
        self._sums = torch.zeros(4, len(self._edits), dtype=torch.float64)
        self._highest = torch.full((2, len(self._edits)), -torch.inf, dtype=torch.float64)
        self._reads = False

    def note(self, one: Pass) -> None:
        """Take down one forward pass; adding up is put off, so that this costs next to nothing."""
        if one.x.requires_grad or one.change.requires_grad or one.x.numel() > _SMALL:
            # What is put off must not keep large activations, or a graph, alive.
            change = one.change.detach()
            change = norm(change)[..., None] if change.dim() > 1 else change
            one = one._replace(x=norm(one.x)[..., None], change=change)
        self._pending.append(one)
        if len(self._pending) >= _PENDING:
            # Of the last one it isn't known yet whether it holds guesses that won't be taken.
            self._add_up(self._pending[:-1])

    @property
    def reached(self) -> bool:
        """Whether any forward pass came to the edits."""
        return bool(self._pending or self._counts)

    @property
    def together(self) -> bool:
        """Whether several of the edits act on the same rows, and share what changes there."""
        return len(set(self._rows)) < len(self._rows)

    def rows_untouched(self, edit: int) -> list[tuple[int, int]]:
        """(prompt, row) of every row that the edit is for in which it was for no position."""
        if not self._counts and all(
            any(one.eligible is None for one in passes) for _, passes in by_prompt(self._pending)
        ):
            return []  # most often; adding up can then wait until somebody reads the receipt
        self._add_up()
        found = []
        for prompt, eligible in self._eligible.items():
            rows = ((eligible[edit] == 0) & self._mine[prompt][edit]).nonzero()[:, 0]
            found += [(prompt, row) for row in rows.tolist()]
        return found

    def summary(self, edit: int) -> EditReceipt:
        """The receipt of one of the edits so far."""
        self._add_up()
        changed, relative, before, after = self._sums[:, edit].tolist()
        counts = [counts[edit].tolist() for counts in self._counts.values()]
        n = sum(map(sum, counts))
        reads = self._reads and n > 0
        row = self._rows[edit]
        mine = [self._mine[prompt][edit].tolist() for prompt in self._positions]
        positions = [
            [here if own else [] for here, own in zip(rows, owned, strict=True)]
            for rows, owned in zip(self._positions.values(), mine, strict=True)
        ]
        return EditReceipt(
            edit=self._edits[edit],
            counts=counts,
            positions=positions,
            n_eligible=sum(int(eligible[edit].sum()) for eligible in self._eligible.values()),
            n_edited=n,
            n_changed=int(changed),
            relative_size=relative / n if n else None,
            before_mean=before / n if reads else None,
            before_max=self._highest[0, edit].item() if reads else None,
            after_mean=after / n if reads else None,
            after_max=self._highest[1, edit].item() if reads else None,
            row=row,
        )

    def traces(self, edit: int) -> list[list[list[TokenTrace]]]:
        """Of the first 16 prompts, of each row, every token that passed through, in order."""
        self._add_up()
        column = None if self._columns is None else self._columns[edit]
        found = []
        for prompt, parts in self._traced.items():
            rows: list[list[TokenTrace]] = [[] for _ in parts[0].padding]
            for part in parts:
                for row, tokens in enumerate(part.of(self._mine[prompt][edit], column)):
                    rows[row] += tokens
            found.append(rows)
        return found

    def _add_up(self, some: list[Pass] | None = None) -> None:
        passes = self._pending if some is None else some
        # Steps of one text are alike and are added up in one go.
        for prompt, group in by_prompt(passes):
            self._add_prompt(prompt, group)
        self._pending = self._pending[len(passes) :]

    def _add_prompt(self, prompt: int, passes: list[Pass]) -> None:
        eligible = masks_of(passes, [one.eligible for one in passes])
        chosen = masks_of(passes, [one.chosen for one in passes])
        rows = passes[0].tokens.source_rows.to(chosen.device)
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        mine = torch.stack([everywhere if r is None else rows == r for r in self._rows])
        if prompt not in self._counts:
            self._mine[prompt] = mine
            self._counts[prompt] = self._eligible[prompt] = torch.zeros_like(mine, dtype=torch.long)
            if len(self._counts) <= KEPT:
                self._positions[prompt] = [[] for _ in rows]
                self._traced[prompt] = []
        if chosen.shape[1] == 0:
            return
        self._counts[prompt] = self._counts[prompt] + chosen.sum(1) * mine
        self._eligible[prompt] = self._eligible[prompt] + eligible.sum(1) * mine

        def by_edit(of_row: Tensor) -> Tensor:
            """Sums [n] of what is [batch], or [batch, m] with a column for each edit."""
            if of_row.dim() == 1:
                return (mine * of_row.double()).sum(1)
            return (mine * of_row.double()[:, self._columns].T).sum(1)

        norm = norms_of(passes, [one.x for one in passes]).clamp_min(1e-12)
        change = passes[0].change
        if change.dim() == 1:
            relative = by_edit((chosen / norm).sum(1)) * change.to(norm.device)
            changed = by_edit(chosen.sum(1)) * (change > 0).to(norm.device)
        else:
            size = norms_of(passes, [one.change for one in passes]) * chosen
            relative, changed = by_edit((size / norm).sum(1)), by_edit((size > 0).sum(1))
        before = after = None
        sums = [changed, relative, torch.zeros_like(changed), torch.zeros_like(changed)]
        if passes[0].before is not None:
            self._reads = True
            before = joined(passes, [one.before for one in passes])
            after = joined(passes, [one.after for one in passes])
            here = chosen[..., None]
            sums[0] = by_edit(((before != after) & here).sum(1))
            sums[2] = by_edit((before.double() * here).sum(1))
            sums[3] = by_edit((after.double() * here).sum(1))
            for at, reading in enumerate((before, after)):
                highest = reading.double().where(here, -torch.inf).amax(1)  # [batch, m]
                mine_only = highest[:, self._columns].T.where(mine, -torch.inf).amax(1)
                self._highest[at] = torch.maximum(self._highest[at], mine_only.cpu())
        self._sums += torch.stack(sums).cpu()
        if prompt in self._positions:
            for one in passes:
                self._keep_positions(prompt, one)
            self._traced[prompt].append(_Traced.of_passes(passes, chosen, before, after))

    def _keep_positions(self, prompt: int, one: Pass) -> None:
        tokens, first = one.tokens, one.tokens.first_new
        if tokens.prompt_length is not None and tokens.past_length + first >= tokens.prompt_length:
            return  # all generated
        new = slice(first, tokens.kept)
        inside = (mask_of(one, one.chosen) & ~tokens.is_generated)[:, new]
        for row, (positions, here) in enumerate(zip(tokens.positions[:, new], inside, strict=True)):
            self._positions[prompt][row] += positions[here].tolist()


class _Traced(NamedTuple):
    """Columns of some passes: ids, chosen, padding [batch, n]; readings [batch, n, m]."""

    ids: Tensor | None
    chosen: Tensor
    padding: Tensor
    before: Tensor | None
    after: Tensor | None

    @classmethod
    def of_passes(
        cls, passes: list[Pass], chosen: Tensor, before: Tensor | None, after: Tensor | None
    ) -> "_Traced":
        known = all(one.tokens.input_ids is not None for one in passes)
        ids = joined(passes, [one.tokens.input_ids for one in passes]) if known else None
        if all(one.tokens.unpadded for one in passes):
            padding = torch.zeros_like(chosen)
        else:
            padding = joined(passes, [one.tokens.is_padding for one in passes])
        return cls(ids, chosen, padding, before, after)

    def of(self, mine: Tensor, column: int | None) -> list[list[TokenTrace]]:
        """By row, for the edit that is for the rows `mine` [batch] and reads `column`."""
        none = [[None] * self.chosen.shape[1]] * len(self.chosen)
        columns: list[list[list[Any]]] = [
            none if self.ids is None else self.ids.tolist(),
            (self.chosen & mine[:, None]).tolist(),
            *(
                none if each is None or column is None else each[..., column].tolist()
                for each in (self.before, self.after)
            ),
        ]
        padding = self.padding.tolist()
        return [
            [
                TokenTrace(*token)
                for token, padded in zip(
                    zip(*(each[row] for each in columns), strict=True), padding[row], strict=True
                )
                if not padded
            ]
            for row in range(len(padding))
        ]
