"""Expand: what a segment's adapter adds, scale * s B^T, for a tile of rows and output columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_rows(
    block, nth, count, end_row, segment_first, BM: tl.constexpr
):
    """First row and end row of a block's nth segment."""
    place = segment_first + block * BM + nth
    first = tl.load(place)
    after = tl.load(place + 1, mask=nth + 1 < count, other=0)
    return first, tl.where(nth + 1 < count, after, end_row)


@triton.jit
def add_expand(
    acc, s, row, mine, column, scale, pool, b, rank, n, out_size,
    s_stride, split_stride,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, RC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] += scale * s B^T, for the rows that are `mine`.

    Args:
        row: sorted rows [rows]; s has their shrunk values from `column` on.
        b: B's first element in the pool; B is [out_size, rank], and n are the tile's rows of it.
    """
    if ALIGNED:  # lets the compiler see that 16-byte loads are right
        b = b // 8 * 8
        rank = rank // 8 * 8
        column = column // 8 * 8
    for first_r in range(0, rank, RC):
        r = first_r + tl.arange(0, RC)
        inside = mine[:, None] & (r < rank)[None, :]
        place = s + row.to(tl.int64)[:, None] * s_stride + column + r[None, :]
        shrunk = tl.load(place, mask=inside, other=0.0)
        for split in tl.static_range(1, SPLITS):
            shrunk += tl.load(place + split * split_stride, mask=inside, other=0.0)
        factor = pool + b + n.to(tl.int64)[None, :] * rank + r[:, None]
        factors = tl.load(factor, mask=(r < rank)[:, None] & (n < out_size)[None, :], other=0.0)
        acc = tl.dot((shrunk * scale).to(DTYPE), factors.to(DTYPE), acc, input_precision="ieee")
    return acc
