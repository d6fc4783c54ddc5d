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
    b = tl.zeros([EK], tl.int64)
    rank = tl.zeros([EK], tl.int32)
    r = tl.zeros([EK], tl.int32)
    first = tl.zeros([EK], tl.int32)
    end = tl.zeros([EK], tl.int32)
    # Scalar by scalar: a vector of them would be copied through shared memory, element by element.
    for nth in tl.static_range(EK // GROUP):
        place = list_id * list_length + first_group + nth
        here = first_group + nth < count
        chosen = j // GROUP == nth
        b = tl.where(chosen, tl.load(group_b + place, mask=here, other=0), b)
        rank = tl.where(chosen, tl.load(group_rank + place, mask=here, other=0), rank)
        r = tl.where(chosen, tl.load(group_nth + place, mask=here, other=0) * GROUP, r)
        first = tl.where(chosen, tl.load(group_first + place, mask=here, other=0), first)
        end = tl.where(chosen, tl.load(group_end + place, mask=here, other=0), end)
    r += j % GROUP
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


@triton.jit
def group_ahead(
    list_id, count, group_b, group_rank, group_nth, group_first, group_end, list_length
):
    """What the lists say of a list's first group, as scalars that are cheap to hold for long."""
    place = list_id * list_length
    here = count > 0
    b = tl.load(group_b + place, mask=here, other=0)
    rank = tl.load(group_rank + place, mask=here, other=0)
    first = tl.load(group_first + place, mask=here, other=0)
    end = tl.load(group_end + place, mask=here, other=0)
    return b, rank, first, end


@triton.jit
def add_group(
    acc, s, row, column, b, rank, first, end, pool, n, out_size, s_stride, split_stride,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] += s B^T for one group, the first of its run."""
    r = tl.arange(0, GROUP)
    if ALIGNED:
        b = b // 8 * 8
        rank = rank // 8 * 8
        s_stride = s_stride // 8 * 8
    mine = ((row >= first) & (row < end))[:, None] & (r < rank)[None, :]
    there = (r < rank)[:, None] & (n < out_size)[None, :]
    shrunk_at = s + row.to(tl.int64)[:, None] * s_stride + column + r[None, :]
    shrunk = tl.load(shrunk_at, mask=mine, other=0.0)
    for split in tl.static_range(1, SPLITS):
        shrunk += tl.load(shrunk_at + split * split_stride, mask=mine, other=0.0)
    factors = tl.load(pool + b + n[None, :] * rank + r[:, None], mask=there, other=0.0)
    return tl.dot(shrunk.to(DTYPE), factors.to(DTYPE), acc, input_precision="ieee")
