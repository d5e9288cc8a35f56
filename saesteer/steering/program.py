"""Edits made ready to run: what can be worked out once is, before the model starts.

The edits at one hook point become steps, in the order written: one for each `Add`, and one for
each run of clamps of the same SAE, whose activations are all read from the same unedited x.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from saesteer.core.sae import Sae
from saesteer.core.tokens import Tokens
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.positions import Positions
from saesteer.steering.receipt import Record

Masks = Callable[[Tokens, Positions], Tensor]


def compile_point(
    edits: Sequence[tuple[Edit, Record]], masks: Masks, device: torch.device
) -> Callable[[Tensor, Tokens], Tensor]:
    """One function x [batch, seq, d], tokens → x for all edits at one place, in order.

    masks: gives the chosen tokens [batch, seq] of a pass for a `Positions`.
    """
    steps: list[AddStep | ClampStep] = []
    for group in _runs(edits):
        first, record = group[0]
        if isinstance(first, Add):
            steps.append(AddStep(first, record, masks, device))
        else:
            clamps = [(edit, record) for edit, record in group if isinstance(edit, Clamp)]
            steps.append(ClampStep(first.sae, clamps, masks, device))

    def run(x: Tensor, tokens: Tokens) -> Tensor:
        for step in steps:
            x = step(x, tokens)
        return x

    return run


class AddStep:
    """x + strength · vector where chosen."""

    def __init__(self, edit: Add, record: Record, masks: Masks, device: torch.device) -> None:
        self._exact = edit.vector.to(device, torch.float32) * edit.strength  # [d]
        self._change = self._exact  # the same, rounded to the activations' dtype
        self._size = self._exact.detach().norm()
        # Adding zero isn't always nothing to the bit: -0 + 0 is +0.
        self._nothing = edit.strength == 0
        self._where, self._record, self._masks = edit.where, record, masks

    def __call__(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self._change.dtype != x.dtype or self._change.device != x.device:
            self._change, self._size = self._exact.to(x), self._size.to(x.device)
        chosen = self._masks(tokens, self._where)
        self._record.note(tokens, chosen, self._size, _norm(x))
        if self._nothing:
            return x
        return torch.where(chosen[..., None], x + self._change, x)


class ClampStep:
    """x + D(Σ (t_i − a_i(x)) W_dec[i]) where chosen: DESIGN.md, law 1."""

    def __init__(
        self,
        sae: Sae,
        clamps: Sequence[tuple[Clamp, Record]],
        masks: Masks,
        device: torch.device,
    ) -> None:
        features = list(dict.fromkeys(clamp.feature for clamp, _ in clamps))
        self._names = features
        if sae.architecture != "topk":
            # Only the chosen columns are ever needed, and only they are moved.
            sae = sae.narrowed(features)
            self._names = list(range(len(features)))
        self._sae = sae.to(device, torch.float32)
        self._masks = masks
        column = {feature: i for i, feature in enumerate(features)}
        self._rounds = [_Round(r, column, device) for r in _distinct(clamps)]

    def __call__(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self._sae.W_dec.device != x.device:
            self._sae = self._sae.to(x.device)
        wide = x.float()
        before = self._sae.activation(wide, self._names)  # [batch, seq, n]
        after, noted = before, []
        for clamps in self._rounds:
            chosen = self._masks(tokens, clamps.where)
            was, after = after, clamps.put(after, chosen[..., None])
            noted.append((clamps, chosen, was.detach(), after.detach()))
        difference = after - before
        change = self._sae.write(difference, self._names, wide)
        size, norm = _norm(change), _norm(x)
        for clamps, chosen, was, now in noted:
            for record, i in zip(clamps.records, clamps.columns, strict=True):
                record.note(tokens, chosen, size, norm, was, now, i)
        # Where nothing is to change, x itself, to the bit.
        touched = (difference != 0).any(-1, keepdim=True)
        return torch.where(touched, x + change.to(x.dtype), x)


class _Round:
    """Clamps of distinct features that agree on how and where, and so act at once."""

    def __init__(
        self,
        clamps: Sequence[tuple[Clamp, Record]],
        column: Mapping[int, int],
        device: torch.device,
    ) -> None:
        first = clamps[0][0]
        self.how, self.where = first.how, first.where
        self.records = [record for _, record in clamps]
        self.columns = [column[clamp.feature] for clamp, _ in clamps]
        self._values = torch.tensor([clamp.value for clamp, _ in clamps], device=device)
        self._index = torch.tensor(self.columns, device=device)
        self._all = self.columns == list(range(len(column)))

    def put(self, activations: Tensor, chosen: Tensor) -> Tensor:
        """Activations [batch, seq, n] with this round's targets in place where chosen [.., 1]."""
        if self._values.device != activations.device:
            self._values = self._values.to(activations.device)
            self._index = self._index.to(activations.device)
        was = activations if self._all else activations[..., self._index]
        now = torch.where(chosen, self._target(was), was)
        return now if self._all else activations.index_copy(-1, self._index, now)

    def _target(self, activations: Tensor) -> Tensor:
        if self.how == "set":
            return self._values
        if self.how == "min":
            return torch.maximum(activations, self._values)
        if self.how == "max":
            return torch.minimum(activations, self._values)
        return activations * self._values


def _distinct(
    clamps: Sequence[tuple[Clamp, Record]],
) -> Iterator[list[tuple[Clamp, Record]]]:
    """Neighbouring clamps of one kind and place, cut before a feature comes a second time."""
    for _, alike in groupby(clamps, key=lambda pair: (pair[0].how, pair[0].where)):
        round_: list[tuple[Clamp, Record]] = []
        for clamp, record in alike:
            if any(clamp.feature == other.feature for other, _ in round_):
                yield round_
                round_ = []
            round_.append((clamp, record))
        yield round_


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32)


def _runs(edits: Sequence[tuple[Edit, Record]]) -> Iterator[list[tuple[Edit, Record]]]:
    """Neighbouring clamps of one SAE together, everything else by itself."""
    run: list[tuple[Edit, Record]] = []
    for edit, record in edits:
        if run and not _same_sae(run[-1][0], edit):
            yield run
            run = []
        run.append((edit, record))
    if run:
        yield run


def _same_sae(first: Edit, second: Edit) -> bool:
    if not (isinstance(first, Clamp) and isinstance(second, Clamp)):
        return False
    a, b = first.sae, second.sae
    # One SAE loaded twice is still one SAE.
    return a is b or (a.W_enc.shape == b.W_enc.shape and a.hash == b.hash)
