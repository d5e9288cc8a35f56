"""How an architecture chooses what fires, and how it is saved.

Each takes pre-activations [batch, d_sae] and k, and returns what it chose in sparse form. Adding
an architecture adds one function and one line of `ARCHITECTURES`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Chosen(NamedTuple):
    """What fires in a batch, ordered by row.

    rows, latents: int64 [nnz]; values: [nnz], all > 0; starts: int64 [batch], where each row's
    begin.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Architecture:
    """choose: pre-activations [batch, d_sae] and k to what fires; saved_as: `Sae.architecture`."""

    choose: Callable[[Tensor, int], Chosen]
    saved_as: str


def topk(pre: Tensor, k: int) -> Chosen:
    """Each row's k largest pre-activations, where positive (Gao et al. 2024, arXiv 2406.04093)."""
    values, latents = pre.topk(k, dim=-1, sorted=False)
    rows = torch.arange(len(pre), device=pre.device)
    if bool((values > 0).all()):
        return Chosen(rows.repeat_interleave(k), latents.flatten(), values.flatten(), rows * k)
    row, column = (values > 0).nonzero(as_tuple=True)
    return _with_starts(row, latents[row, column], values[row, column], len(pre))


def batch_topk(pre: Tensor, k: int) -> Chosen:
    """The k · batch largest positive pre-activations of the whole batch, exactly.

    (Bussmann et al. 2024, arXiv 2412.06410.) A full sort of batch × d_sae values is slow, so a
    bound guessed from a few rows leaves out most of them first; where fewer than k · batch lie
    above it, it is lowered, so the guess never changes the answer. Of equal values at the edge
    the earlier ones are taken.
    """
    wanted = k * len(pre)
    flat = pre.reshape(-1)
    sample = pre[:: max(1, len(pre) // 64)]
    share = 1.3 * k / pre.shape[1]
    while True:
        rank = int(sample.numel() * (1 - share))
        bound = (
            sample.reshape(-1).kthvalue(rank).values.clamp_min(0) if rank > 0 else pre.new_zeros(())
        )
        candidates = (flat > bound).nonzero()[:, 0]
        if len(candidates) >= wanted or float(bound) == 0:
            break
        share *= 2
    values = flat[candidates]
    if len(candidates) > wanted:
        edge = values.topk(wanted, sorted=False).values.min()
        keep = values > edge
        ties = (values == edge).nonzero()[:, 0]
        keep[ties[: wanted - int(keep.sum())]] = True
        candidates, values = candidates[keep], values[keep]
    return _with_starts(candidates // pre.shape[1], candidates % pre.shape[1], values, len(pre))


def _with_starts(rows: Tensor, latents: Tensor, values: Tensor, n_rows: int) -> Chosen:
    counts = torch.bincount(rows, minlength=n_rows)
    return Chosen(rows, latents, values, counts.cumsum(0) - counts)


ARCHITECTURES: dict[str, Architecture] = {
    "topk": Architecture(topk, saved_as="topk"),
    "batchtopk": Architecture(batch_topk, saved_as="jumprelu"),
}


def calibrated_threshold(batches: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The threshold above which k latents a row fire on average, exactly, on given rows.

    A moving average of training batches' smallest kept value starts from zero and lags behind the
    weights, so a short run would save an SAE that fires far too often.

    Args:
        batches: called for an iterable of pre-activations [batch, d_sae]; called again where the
            first pass kept too few of some batch's values.
        k: mean number of latents wanted a row.

    Returns:
        The threshold; 0 where fewer than k a row are positive at all.
    """
    factor = 2
    while True:
        kept: list[Tensor] = []
        unseen = 0.0  # no value that was left out is above it
        rows = 0
        for pre in batches():
            chosen = batch_topk(pre, min(factor * k, pre.shape[1]))
            if len(chosen.values) == factor * k * len(pre):
                unseen = max(unseen, float(chosen.values.min()))
            kept.append(chosen.values)
            rows += len(pre)
        values = torch.cat(kept).sort(descending=True).values
        wanted = k * rows
        if len(values) <= wanted:
            return 0.0
        if float(values[wanted]) >= unseen:
            return float(values[wanted - 1] + values[wanted]) / 2
        factor *= 2
