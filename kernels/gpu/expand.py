"""Expand: what a block's adapters add to a tile, s B^T, some groups of ranks at a time.

Groups of several adapters share one dot: each row's s is zero outside its own adapter's groups.
Loads of a step's groups are in flight together, and the compiler pipelines the steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shrink import GROUP


@triton.jit
def add_groups(
    acc, s, row, list_id, count, first_group, column,
    group_b, group_rank, group_nth, group_first, group_end, list_length,
    pool, n, out_size, s_stride, split_stride,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] += s B^T for EK / GROUP groups of a list.

    Args:
        row: sorted rows [rows]; s has their shrunk values from `column` on.
        n: the tile's output columns, which are rows of B [out_size, rank].
    """
    j = tl.arange(0, EK)
    group = first_group + j // GROUP
    here = group < count
    place = list_id * list_length + group
    b = tl.load(group_b + place, mask=here, other=0)
    rank = tl.load(group_rank + place, mask=here, other=0)
    r = tl.load(group_nth + place, mask=here, other=0) * GROUP + j % GROUP
    first = tl.load(group_first + place, mask=here, other=0)
    end = tl.load(group_end + place, mask=here, other=0)
    inside = r < rank
    mine = (row[:, None] >= first[None, :]) & (row[:, None] < end[None, :]) & inside[None, :]
    there = inside[:, None] & (n < out_size)[None, :]
    shrunk_at = s + row.to(tl.int64)[:, None] * s_stride + column + r[None, :]
    factor_at = pool + b[:, None] + n[None, :] * rank[:, None] + (j % GROUP)[:, None]
    if ALIGNED:  # what the compiler can't see through loaded numbers: 16-byte loads are right
        shrunk_at = tl.max_contiguous(tl.multiple_of(shrunk_at, [1, 16]), [1, 8])
        mine = tl.max_constancy(mine, [1, 8])
        factor_at = tl.max_contiguous(tl.multiple_of(factor_at, [16, 1]), [8, 1])
        there = tl.max_constancy(there, [8, 1])
    shrunk = tl.load(shrunk_at, mask=mine, other=0.0)
    for split in tl.static_range(1, SPLITS):
        shrunk += tl.load(shrunk_at + split * split_stride, mask=mine, other=0.0)
    factors = tl.load(factor_at, mask=there, other=0.0)
    return tl.dot(shrunk.to(DTYPE), factors.to(DTYPE), acc, input_precision="ieee")
