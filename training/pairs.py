"""The (row, latent) pairs of a batch that take part in a step, and the sums over them.

Losses are written once (`architectures`), over values that belong to pairs. Where few pairs take
part they are a list, and products touch only these; where many do, as in a ReLU's first steps, they
are a whole [rows, d_sae] tensor and the products are dense.
"""

from functools import cached_property

import torch
from torch import Tensor

from saesteer.training.products import decode, gathered, products
from saesteer.training.ranks import Ranks


class SparsePairs:
    """A list of pairs, ordered by row; values of pairs are [nnz].

    Args:
        rows, latents: int64 [nnz]; starts: int64 [n_rows]; d_sae: latents there are.
        ranks: those that hold the other latents of the same rows.
    """

    def __init__(self, rows: Tensor, latents: Tensor, starts: Tensor, d_sae: int, ranks: Ranks):
        self.rows, self.latents, self.starts, self.d_sae = rows, latents, starts, d_sae
        self._ranks = ranks

    def of(self, parameter: Tensor) -> Tensor:
        """Each pair's own of a parameter [d_sae]."""
        return parameter[self.latents]

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """Σ over a row's pairs, on all ranks, of value · decoder row, [n_rows, d]."""
        return self._ranks.sum_(decode(self.latents, values, self.starts, decoder))

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left[row] · right[latent] of each pair; left [n_rows, d], right [d_sae, d]."""
        return products(self.rows, self.latents, left, right)

    def gathered(self, values: Tensor, source: Tensor) -> Tensor:
        """Σ over a latent's pairs of value · source[row], [d_sae, d]; source [n_rows, d]."""
        rows, order, starts = self._by_latent
        return gathered(rows, values[order], starts, source)

    def per_latent(self, values: Tensor) -> Tensor:
        """Σ over a latent's pairs of its values, [d_sae]."""
        return values.new_zeros(self.d_sae).index_add_(0, self.latents, values)

    def fired(self, fires: Tensor) -> Tensor:
        """Which latents fire at all: bool [d_sae] of a bool for each pair."""
        out = torch.zeros(self.d_sae, dtype=torch.bool, device=fires.device)
        out[self.latents[fires]] = True
        return out

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs' rows and their places, ordered by latent, and where each latent's begin."""
        order = stable_order(self.latents, self.d_sae)
        counts = torch.bincount(self.latents, minlength=self.d_sae)
        return self.rows[order], order, counts.cumsum(0) - counts


class DensePairs:
    """Every pair of a few rows; values of pairs are [n_rows, d_sae].

    Args:
        dtype: that products are made in (float32 values, whatever it is).
        ranks: those that hold the other latents of the same rows.
    """

    def __init__(self, dtype: torch.dtype, ranks: Ranks):
        self.dtype, self._ranks = dtype, ranks

    def of(self, parameter: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return parameter

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return self._ranks.sum_(self._product(values, decoder))

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return self._product(left, right.T)

    def gathered(self, values: Tensor, source: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return self._product(values.T, source)

    def per_latent(self, values: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return values.sum(0)

    def fired(self, fires: Tensor) -> Tensor:
        """As in `SparsePairs`."""
        return fires.any(0)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return (left.to(self.dtype) @ right.to(self.dtype)).to(left.dtype)


Pairs = SparsePairs | DensePairs


def stable_order(keys: Tensor, most: int) -> Tensor:
    """argsort of int64 keys in [0, most), equal ones in the order they came in."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    # numpy sorts 16-bit integers by counting, many times faster than it compares 64-bit ones.
    order = torch.from_numpy((keys & 0xFFFF).numpy().astype("uint16").argsort(kind="stable"))
    if most > 2**16:
        high = (keys >> 16)[order].numpy().astype("uint16")
        order = order[torch.from_numpy(high.argsort(kind="stable"))]
    return order
