"""The three sparse products of a training step, over a list of (row, latent) pairs.

Two sums and one product of pairs: what the pairs decode to, each pair's own product, and what they
add to a gradient. On a GPU they are Triton's kernels where Triton is installed; elsewhere the
fastest of torch's own forms, which are also what the kernels are tested against.

Tables may be bfloat16 or float16; sums are made, and given, in float32 at least.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# From 16 MB on a table leaves a processor's cache, and reading it in order is worth a sort.
_LARGE = 2**22


def decode(latents: Tensor, values: Tensor, starts: Tensor, decoder: Tensor) -> Tensor:
    """Σ over each row's pairs of value · decoder row, [n_rows, d].

    Args:
        latents: int64 [nnz]; values: [nnz]; both ordered by row.
        starts: int64 [n_rows], ascending from 0: where each row's pairs begin; a row may have none.
        decoder: [d_sae, d].
    """
    return _weighted_sums(latents, values, starts, decoder)


def gathered(rows: Tensor, values: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """Σ over each latent's pairs of value · source row, [d_sae, d].

    Args:
        rows: int64 [nnz]; values: [nnz]; both ordered by latent.
        starts: int64 [d_sae], ascending from 0: where each latent's pairs begin; it may have none.
        source: [n_rows, d].
    """
    return _weighted_sums(rows, values, starts, source)


def products(rows: Tensor, latents: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[row] · right[latent] of each pair, [nnz].

    Args:
        rows, latents: int64 [nnz], ordered by row.
        left: [n_rows, d]; right: [d_sae, d].
    """
    dtype = _sum_dtype(left, right)
    kernels = _kernels(left, dtype)
    if kernels is not None:
        return kernels.pair_products(rows, latents, left, right)
    left, right = left.to(dtype), right.to(dtype)
    if right.numel() <= max(_LARGE, 2 * left.numel()):
        return _sampled(rows, latents, left, right)
    order = latents.argsort(stable=True)
    out = left.new_empty(len(rows))
    out[order] = _sampled(latents[order], rows[order], right, left)
    return out


def _weighted_sums(index: Tensor, values: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    dtype = _sum_dtype(values, table)
    kernels = _kernels(table, dtype)
    if kernels is not None:
        return kernels.weighted_sums(index, values, starts, table)
    return F.embedding_bag(
        index, table.to(dtype), starts, mode="sum", per_sample_weights=values.to(dtype)
    )


def _sampled(first: Tensor, second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[first] · right[second], with first ascending."""
    counts = torch.bincount(first, minlength=len(left))
    pattern = torch.sparse_csr_tensor(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        second,
        left.new_zeros(len(first)),
        (len(left), len(right)),
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def _sum_dtype(*factors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def _kernels(table: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """Triton's, where they can be used; they sum in float32 alone."""
    return _with_triton() if table.is_cuda and dtype == torch.float32 else None


@cache
def _with_triton() -> ModuleType | None:
    return import_module("saesteer.training.kernels") if find_spec("triton") else None


# torch says once a process that its CSR tensors are in beta; it is of no use to our users.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.long), torch.zeros(0))
