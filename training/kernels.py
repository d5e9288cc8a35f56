"""The sparse products on a GPU, in Triton: weighted sums of a table's rows, and products of pairs.

Every sum is made in float32 and in an order that the shapes and the pairs alone decide: there are
no atomic adds, so the same batch gives the same bits, and a resumed run those of one that was not
interrupted.

Blocks are fixed rather than tuned on the spot: a tuner may choose another block on the next
machine or day, which changes the order of the sums and with it the bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"
# (a kernel's arguments are pointers and numbers to Triton, which has no types and may be missing)

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of 16 pairs by 128 columns gives each of a program's 128 threads 16 loads at once, which is
# what hides the latency of rows that lie anywhere; a row's 128 columns are at least 256 bytes in a
# piece, so that no part of a transfer is wasted.
_PAIRS, _COLUMNS = 16, 128
# Whether a product and a sum are rounded once is said, since Triton's own choice is to change.
_TILE = {"PAIRS": _PAIRS, "COLUMNS": _COLUMNS, "enable_fp_fusion": True}
# Pairs a chunk. A latent that fires in n rows takes one program n / 128 + 2 · 128 steps rather than
# n, and the chunks' sums together are 1/128 of what was gathered.
_CHUNK = 128


@triton.jit
def _run(
    index, values, table, stride, first, last, columns, width,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Σ values · table[index] over pairs first … last, of some columns."""
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for begin in range(first, last, PAIRS):
        pairs = begin + tl.arange(0, PAIRS)
        there = pairs < last
        at = tl.load(index + pairs, mask=there, other=0).to(tl.int64)
        weight = tl.load(values + pairs, mask=there, other=0.0).to(tl.float32)
        tile = tl.load(
            table + at[:, None] * stride + columns[None, :],
            mask=there[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total += tl.sum(weight[:, None] * tile.to(tl.float32), axis=0)
    return total


@triton.jit
def _sum_chunks(
    index, values, table, stride, starts, owners, n_segments, nnz, sums, width,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """First pass: the sums of those chunks of the list that one segment covers whole."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    after = tl.load(owners + chunk) + 1
    end = tl.load(starts + after, mask=after < n_segments, other=nnz)
    first = chunk * CHUNK
    if end >= first + CHUNK:
        total = _run(
            index, values, table, stride, first, first + CHUNK, columns, width, PAIRS, COLUMNS
        )
        tl.store(sums + chunk * width + columns, total, mask=columns < width)


@triton.jit
def _sum_segments(
    index, values, table, stride, starts, n_segments, nnz, sums, out, width,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Second pass: each segment's whole chunks, and the pairs before and after them."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts + segment)
    end = tl.load(starts + segment + 1, mask=segment + 1 < n_segments, other=nnz)
    first_chunk = (start + CHUNK - 1) // CHUNK
    last_chunk = tl.maximum(end // CHUNK, first_chunk)
    head = tl.minimum(end, first_chunk * CHUNK)
    total = _run(index, values, table, stride, start, head, columns, width, PAIRS, COLUMNS)
    for begin in range(first_chunk, last_chunk, PAIRS):
        chunks = begin + tl.arange(0, PAIRS)
        tile = tl.load(
            sums + chunks[:, None] * width + columns[None, :],
            mask=(chunks < last_chunk)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total += tl.sum(tile, axis=0)
    tail = last_chunk * CHUNK
    total += _run(index, values, table, stride, tail, end, columns, width, PAIRS, COLUMNS)
    tl.store(out + segment * width + columns, total, mask=columns < width)


@triton.jit
def _multiply(
    rows, latents, left, left_stride, right, right_stride, out, nnz, width,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """left[row] · right[latent] of a few pairs."""
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = pairs < nnz
    from_left = left + tl.load(rows + pairs, mask=there, other=0).to(tl.int64) * left_stride
    from_right = right + tl.load(latents + pairs, mask=there, other=0).to(tl.int64) * right_stride
    total = tl.zeros([PAIRS], dtype=tl.float32)
    for begin in range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = there[:, None] & (columns < width)[None, :]
        a = tl.load(from_left[:, None] + columns[None, :], mask=mask, other=0.0)
        b = tl.load(from_right[:, None] + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    tl.store(out + pairs, total, mask=there)


def weighted_sums(index: Tensor, values: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Σ values · table[index] over each segment of a list.

    A segment of any length is split into chunks of the list, whose sums are made first and side by
    side, so that a latent that fires in every row holds up nothing.

    Args:
        index: int64 [nnz], in [0, len(table)); values: [nnz]; both ordered by segment.
        starts: int64 [n_segments], ascending from 0; a segment may be empty.
        table: [n, d], float32, bfloat16 or float16.

    Returns:
        float32 [n_segments, d].
    """
    table = _rows_in_one_piece(table)
    nnz, n_segments, width = len(index), len(starts), table.shape[1]
    out = torch.empty(n_segments, width, dtype=torch.float32, device=table.device)
    if out.numel() == 0:
        return out
    index, values, starts = index.contiguous(), values.contiguous(), starts.contiguous()
    n_chunks = nnz // _CHUNK
    blocks = triton.cdiv(width, _COLUMNS)
    sums = out.new_empty(n_chunks, width)
    fixed = {"CHUNK": _CHUNK, **_TILE}
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(table):
        if n_chunks:
            firsts = torch.arange(0, n_chunks * _CHUNK, _CHUNK, device=starts.device)
            # Of several segments that start at one place all but the last are empty.
            owners = torch.searchsorted(starts, firsts, right=True) - 1
            _sum_chunks[(n_chunks, blocks)](
                index, values, table, table.stride(0), starts, owners, n_segments, nnz, sums,
                width, **fixed,
            )  # fmt: skip
        _sum_segments[(n_segments, blocks)](
            index, values, table, table.stride(0), starts, n_segments, nnz, sums, out, width,
            **fixed,
        )  # fmt: skip
    return out


def pair_products(rows: Tensor, latents: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[row] · right[latent] of each pair.

    Args:
        rows, latents: int64 [nnz], in any order; neighbours that share a row are read faster.
        left: [n_rows, d]; right: [d_sae, d]; float32, bfloat16 or float16.

    Returns:
        float32 [nnz].
    """
    left, right = _rows_in_one_piece(left), _rows_in_one_piece(right)
    nnz, width = len(rows), left.shape[1]
    out = torch.empty(nnz, dtype=torch.float32, device=left.device)
    if nnz:
        with torch.cuda.device_of(left):
            _multiply[(triton.cdiv(nnz, _PAIRS),)](
                rows.contiguous(), latents.contiguous(), left, left.stride(0), right,
                right.stride(0), out, nnz, width, **_TILE,
            )  # fmt: skip
    return out


def _rows_in_one_piece(table: Tensor) -> Tensor:
    return table if table.shape[1] <= 1 or table.stride(1) == 1 else table.contiguous()
