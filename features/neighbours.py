"""Nearest neighbours among directions, by cosine."""

import torch
from torch import Tensor

# Columns of one tile of cosines: 32 MB in float32 with 1,024 rows.
_COLUMNS = 8192


def nearest(unit: Tensor, rows: range, k: int) -> tuple[Tensor, Tensor]:
    """For each direction of `rows` the k others of highest cosine, exactly, highest first.

    All rows together take n² d multiply-adds: on one core some 6 s at 16,000 directions of 768,
    6 minutes at 131,000 and 6 hours at a million.

    Args:
        unit: [n, d], of length 1 (or 0: a cosine of 0 with all).
        rows: a stretch of the n directions.
        k: how many; fewer where there are not so many others.

    Returns:
        Indices [rows, k] int64 and cosines [rows, k] float32.
    """
    k = min(k, len(unit) - 1)
    mine = unit[rows.start : rows.stop]
    values, indices = mine.new_zeros(len(mine), 0), mine.new_zeros(len(mine), 0, dtype=torch.int64)
    for left in range(0, len(unit), _COLUMNS):
        cosines = mine @ unit[left : left + _COLUMNS].T
        # No direction is its own neighbour: the diagonal, where it runs through this tile.
        own = torch.arange(rows.start, rows.stop, device=unit.device) - left
        here = (own >= 0) & (own < cosines.shape[1])
        cosines[here.nonzero()[:, 0], own[here]] = -torch.inf
        best = cosines.topk(min(k, cosines.shape[1]), dim=-1)
        values = torch.cat([values, best.values], dim=-1)
        indices = torch.cat([indices, best.indices + left], dim=-1)
        best = values.topk(min(k, values.shape[1]), dim=-1)
        values, indices = best.values, indices.gather(1, best.indices)
    return indices, values.clamp(-1, 1)
