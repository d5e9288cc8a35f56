"""Clamps at work: what runs for each token, and how the rows of a batch share it."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from saesteer.core.sae import Sae
from saesteer.core.tokens import Tokens
from saesteer.errors import SteeringError
from saesteer.steering.edits import Clamp
from saesteer.steering.passes import Pass
from saesteer.steering.steps import Chosen, Placed, Shared, alike


class ClampStep:
    """x + D(Σ (t_i − a_i(x)) W_dec[i]) where chosen: DESIGN.md, law 1.

    Clamps of one SAE that follow one another; all read their activations from the same unedited x.
    A transcoder's are read at its input, before the edits there, and written at its output.
    """

    def __init__(self, placed: Sequence[Placed], shared: Shared) -> None:
        clamps = [(one, one.edit) for one in placed if isinstance(one.edit, Clamp)]
        sae: Sae = clamps[0][1].sae
        features = list(dict.fromkeys(clamp.feature for _, clamp in clamps))
        self._names: Tensor | slice = torch.tensor(features, device=shared.device)
        if sae.architecture != "topk":
            # Only the chosen columns are ever needed, and only they are moved.
            sae, self._names = sae.narrowed(features), slice(None)
        self._sae = sae.to(shared.device, torch.float32)
        column = {feature: i for i, feature in enumerate(features)}
        self._rounds = [_Round(some, column, shared) for some in _distinct(clamps)]

        self._held: _Held | None = None
        self._apart = sae.hook_point_out is not None
        if self._apart:
            shared.readers.setdefault(sae.hook_point, []).append(self.read)

    def read(self, x: Tensor, tokens: Tokens) -> None:
        """Work out the change from x at the place that the SAE reads."""
        if self._sae.W_dec.device != x.device:
            self._sae = self._sae.to(x.device)
            if isinstance(self._names, Tensor):
                self._names = self._names.to(x.device)
        wide = x.float()
        before = self._sae.activation(wide, self._names)  # [batch, seq, n]
        after, noted = before, []
        for clamps in self._rounds:
            masks = clamps.chosen.masks(tokens)
            was, after = after, clamps.put(after, masks[1], tokens)
            noted.append((clamps, masks, was.detach(), after.detach()))
        difference = after - before
        change = self._sae.write(difference, self._names, wide)
        touched = (difference != 0).any(-1, keepdim=True)
        self._held = _Held(tokens, change, touched, noted)

    def __call__(self, x: Tensor, tokens: Tokens) -> Tensor:
        if not self._apart:
            self.read(x, tokens)
        held, self._held = self._held, None
        if held is None or held.tokens.forward_index != tokens.forward_index:
            raise SteeringError(
                f"the transcoder's input at {self._sae.hook_point} was not read before "
                f"{self._sae.write_point}: this model's parts run in another order"
            )
        change, chosen = held.change.to(x.device), self._rounds[0].chosen
        # Where nothing is to change, x itself, to the bit.
        new = torch.where(held.touched.to(x.device), chosen.finished(x, change), x)
        if chosen.keep_norm:
            change = new - x
        for clamps, masks, was, now in held.noted:
            if self._apart:  # read at another place, perhaps on another device
                eligible, on = (None if mask is None else mask.to(x.device) for mask in masks)
                masks, was, now = (eligible, on), was.to(x.device), now.to(x.device)
            clamps.record.note(Pass(tokens, *masks, x, change, was, now))
        return new


class _Held(NamedTuple):
    """The change that clamps make in a pass [batch, seq, d], where, and what there is to note."""

    tokens: Tokens
    change: Tensor
    touched: Tensor
    noted: list[tuple["_Round", tuple[Tensor | None, Tensor | None], Tensor, Tensor]]


class _Round:
    """Clamps of distinct features in each row that agree on how, where and when: they act at once.

    It holds a value for each row that has its own edits, or one row of values for all.
    """

    def __init__(
        self, clamps: Sequence[tuple[Placed, Clamp]], column: Mapping[int, int], shared: Shared
    ) -> None:
        first, self._how = clamps[0][1], clamps[0][1].how
        self.chosen = Chosen(first, shared)
        columns = [column[clamp.feature] for _, clamp in clamps]
        self.record = shared.record([one for one, _ in clamps], columns)
        used = list(dict.fromkeys(columns))
        values = torch.zeros(max(1, shared.rows), len(used))
        has = torch.zeros(values.shape, dtype=torch.bool)
        for (one, clamp), at in zip(clamps, columns, strict=True):
            values[one.row or 0, used.index(at)] = clamp.value
            has[one.row or 0, used.index(at)] = True
        self._values = values.to(shared.device)
        self._has = None if shared.rows == 0 else has.to(shared.device)
        self._index = torch.tensor(used, device=shared.device)
        self._all = used == list(range(len(column)))

    def put(self, activations: Tensor, mask: Tensor | None, tokens: Tokens) -> Tensor:
        """Activations [batch, seq, n] with this round's targets in place where chosen."""
        if self._values.device != activations.device:
            self._values = self._values.to(activations.device)
            self._index = self._index.to(activations.device)
            self._has = None if self._has is None else self._has.to(activations.device)
        was = activations if self._all else activations[..., self._index]
        values, here = self._values, None if mask is None else mask[..., None]
        if self._has is not None:
            rows = tokens.source_rows
            values, has = values[rows][:, None], self._has[rows][:, None]
            here = has if here is None else here & has
        now = self._target(was, values)
        factor = self.chosen.factor(tokens)
        if factor is not None:
            now = was + factor * (now - was)
        now = now.expand(was.shape) if here is None else torch.where(here, now, was)
        return now if self._all else activations.index_copy(-1, self._index, now)

    def _target(self, activations: Tensor, values: Tensor) -> Tensor:
        if self._how == "set":
            return values
        if self._how == "min":
            return torch.maximum(activations, values)
        if self._how == "max":
            return torch.minimum(activations, values)
        return activations * values


def _distinct(clamps: Sequence[tuple[Placed, Clamp]]) -> list[list[tuple[Placed, Clamp]]]:
    """Rounds of clamps, each row's in its own order.

    A row's neighbouring clamps of one kind, place and time are a round, cut before one of its
    features comes a second time; rows join the rounds of the rows before them where they fit.
    """
    by_row: dict[int | None, list[list[tuple[Placed, Clamp]]]] = {}
    for row, some in groupby(clamps, key=lambda pair: pair[0].row):
        rounds = by_row.setdefault(row, [])
        for pair in some:
            latest = rounds[-1] if rounds else []
            if (
                not latest
                or not _at_once(latest[0][1], pair[1])
                or any(pair[1].feature == other.feature for _, other in latest)
            ):
                rounds.append([])
            rounds[-1].append(pair)
    joined: list[list[tuple[Placed, Clamp]]] = []
    for rounds in by_row.values():
        at = 0
        for round_ in rounds:
            while at < len(joined) and not _at_once(joined[at][0][1], round_[0][1]):
                at += 1
            if at == len(joined):
                joined.append([])
            joined[at] += round_
            at += 1
    return joined


def _at_once(first: Clamp, second: Clamp) -> bool:
    return first.how == second.how and alike(first, second)
