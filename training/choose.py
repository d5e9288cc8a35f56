"""Which latents fire in a batch: the k largest of a row or of the whole batch, in sparse form.

Pre-activations are made a few rows at a time, so that they stay in the processor's cache and no
dense [batch, d_sae] tensor is kept. Where the product is made in bfloat16, a few latents more than
are wanted are kept from it, their pre-activations are made again in float32, and the choice is made
on those.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saesteer.core.sae_codes import largest
from saesteer.training.products import products
from saesteer.training.ranks import Ranks

# Rows a piece: its pre-activations stay in a processor's cache; a GPU wants work, so 1 GB of them.
ROWS_A_PIECE, ELEMENTS_A_PIECE = 256, 2**28
# How many candidates are kept, for each that is wanted, from a product in bfloat16.
_SPARE = 1.25


class Chosen(NamedTuple):
    """What fires in a batch, ordered by row.

    rows, latents: int64 [nnz]; values: [nnz], all > 0; starts: int64 [batch], where each row's
    begin.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    starts: Tensor

    def where(self, keep: Tensor) -> "Chosen":
        """Those of the pairs for which keep [nnz] is true."""
        return chosen(self.rows[keep], self.latents[keep], self.values[keep], len(self.starts))


def chosen(rows: Tensor, latents: Tensor, values: Tensor, n_rows: int) -> Chosen:
    """Pairs that are ordered by row, with where each row's begin."""
    counts = torch.bincount(rows, minlength=n_rows)
    return Chosen(rows, latents, values, counts.cumsum(0) - counts)


class Encoder(NamedTuple):
    """pre = x encoderᵀ + bias; x [batch, d_in], encoder [d_sae, d_in], bias [d_sae].

    dtype: that the product is made in; values are float32 (or x's) whatever it is.
    """

    x: Tensor
    encoder: Tensor
    bias: Tensor
    dtype: torch.dtype

    @property
    def approximate(self) -> bool:
        return self.dtype != self.x.dtype

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, pre-activations [rows, d_sae]) of a few rows at a time.

        The tensor is written over by the next piece.
        """
        n = ROWS_A_PIECE
        if self.x.device.type != "cpu":
            n = max(n, ELEMENTS_A_PIECE // max(1, len(self.encoder)))
        if not self.approximate:
            room = self.x.new_empty(min(n, len(self.x)), len(self.encoder))
            for first in range(0, len(self.x), n):
                piece = self.x[first : first + n]
                out = room[: len(piece)]
                yield first, torch.addmm(self.bias, piece, self.encoder.T, out=out)
            return
        x, encoder = self.x.to(self.dtype), self.encoder.to(self.dtype).T
        for first in range(0, len(x), n):
            yield first, (x[first : first + n] @ encoder).to(self.x.dtype).add_(self.bias)

    def exactly(self, rows: Tensor, latents: Tensor) -> Tensor:
        """The pre-activations of pairs that are ordered by row, [nnz], in x's own dtype."""
        return products(rows, latents, self.x, self.encoder) + self.bias[latents]


def topk(encoder: Encoder, k: int, ranks: Ranks) -> Chosen:
    """Each row's k largest pre-activations, where positive (Gao et al. 2024, arXiv 2406.04093).

    Args:
        k: at most as many as there are latents on all ranks together.
        ranks: those that hold the other latents of the same rows; each gets its own part.
    """
    n, d_sae = len(encoder.x), len(encoder.encoder)
    kept = min(int(_SPARE * k) + 1 if encoder.approximate else k, d_sae)
    values = encoder.x.new_empty(n, kept)
    latents = torch.empty(n, kept, dtype=torch.long, device=encoder.x.device)
    for first, pre in encoder.pieces():
        here = slice(first, first + len(pre))
        values[here], latents[here] = largest(pre, kept)
    rows = torch.arange(n, device=values.device)
    if encoder.approximate:
        values = encoder.exactly(rows.repeat_interleave(kept), latents.flatten()).view(n, kept)
        values, at = values.topk(min(k, d_sae), dim=-1, sorted=False)
        latents = latents.gather(1, at)
    fires = values > 0
    if ranks.size > 1:
        # All ranks choose from the same values, and each keeps what it holds.
        everyone = ranks.gather(values.T.contiguous())
        first = sum(len(each) for each in everyone[: ranks.rank])
        best = torch.cat(everyone).T.topk(k, dim=-1).indices - first
        mine = torch.zeros(n, values.shape[1] + 1, dtype=torch.bool, device=values.device)
        mine.scatter_(1, best.where((best >= 0) & (best < values.shape[1]), values.shape[1]), True)
        fires &= mine[:, :-1]
    elif bool(fires.all()):
        a_row = values.shape[1]
        pairs = rows.repeat_interleave(a_row), latents.flatten(), values.flatten()
        return Chosen(*pairs, rows * a_row)
    row, column = fires.nonzero(as_tuple=True)
    return chosen(row, latents[row, column], values[row, column], n)


def batch_topk(encoder: Encoder, wanted: int, ranks: Ranks) -> Chosen:
    """The `wanted` largest positive pre-activations of the whole batch, exactly.

    (Bussmann et al. 2024, arXiv 2412.06410, with wanted = k · batch.) Sorting batch × d_sae values
    is slow, so a bound guessed from a few leaves out most of them first; where fewer than `wanted`
    lie above it, it is lowered, so the guess never changes the answer (in bfloat16, where it keeps
    more than is wanted, hardly ever). Of equal values at the edge any are taken.

    Args:
        ranks: those that hold the other rows, or the other latents, of the batch; `wanted` counts
            for all of them, and each gets its own part.
    """
    n, d_sae = len(encoder.x), len(encoder.encoder)
    total = int(ranks.sum_(torch.tensor([n * d_sae], device=encoder.x.device)))
    share = 1.3 * wanted / total
    while True:
        bound = None
        parts = []
        for first, pre in encoder.pieces():
            if bound is None:
                bound = _exceeded_by(pre, share)
                bound = -float(ranks.max_(torch.tensor([-bound], device=pre.device)))
            at = (pre > bound).view(-1).nonzero()[:, 0]
            parts.append((at + first * d_sae, pre.view(-1)[at]))
        place, values = (torch.cat(part) for part in zip(*parts, strict=True))
        found = int(ranks.sum_(torch.tensor([len(place)], device=place.device)))
        if found >= wanted or bound == 0:
            break
        share *= 2
    rows, latents = place // d_sae, place % d_sae
    if encoder.approximate:
        values = encoder.exactly(rows, latents)
    keep = values > 0
    if found > wanted:
        everyone = ranks.gather(values)
        first = sum(len(each) for each in everyone[: ranks.rank])
        best = torch.cat(everyone).topk(wanted, sorted=False).indices - first
        mine = torch.zeros_like(keep)
        mine[best[(best >= 0) & (best < len(values))]] = True
        keep &= mine
    return chosen(rows[keep], latents[keep], values[keep], n)


def _exceeded_by(pre: Tensor, share: float) -> float:
    """A bound ≥ 0 that about so large a share of the values exceeds."""
    some = pre[:, :: max(1, pre.numel() // 2**18)].reshape(-1)
    rank = int(some.numel() * (1 - share))
    return max(0.0, float(some.kthvalue(rank).values)) if rank > 0 else 0.0


def calibrated_threshold(batches: Callable[[], Iterable[Encoder]], k: int, ranks: Ranks) -> float:
    """The threshold above which k latents a row fire on average, exactly, on given rows.

    A moving average of training batches' smallest kept value starts from zero and lags behind the
    weights, so a short run would save an SAE that fires far too often.

    Args:
        batches: called for an iterable of encoders of a few thousand rows each; called again where
            the first pass kept too few of some batch's values.
        k: mean number of latents wanted a row.
        ranks: those that hold the other latents of the same rows.

    Returns:
        The threshold; 0 where fewer than k a row are positive at all.
    """
    factor = 2
    while True:
        kept: list[Tensor] = []
        unseen = 0.0  # no value that was left out is above it
        rows = 0
        for encoder in batches():
            n, d_sae = len(encoder.x), len(encoder.encoder)
            d_sae = int(ranks.sum_(torch.tensor([d_sae], device=encoder.x.device)))
            most = min(factor * k, d_sae) * n
            values = torch.cat(ranks.gather(batch_topk(encoder, most, ranks).values))
            if len(values) == most < n * d_sae:
                unseen = max(unseen, float(values.min()))
            kept.append(values)
            rows += n
        values = torch.cat(kept).sort(descending=True).values
        wanted = k * rows
        if len(values) <= wanted:
            return 0.0
        if float(values[wanted]) >= unseen:
            return float(values[wanted - 1] + values[wanted]) / 2
        factor *= 2
