"""Expand: what a block's adapters add to a tile, s B^T, some groups of ranks at a time.

The shrink leaves a list for each block: its adapters' columns of B in groups of GROUP ranks, run
after run. A row's own groups follow each other in the list, so its s lines up with the list's
columns once it is shifted, and is zero outside them: groups of several adapters share one dot.
A list is read a step ahead of the factors that it names.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(16)  # ranks of a group: the least inner dimension that a dot takes

# A group in one number: the ranks that are left in its run from here on, the adapter's rank, and
# where its first column of B lies in the pool, in elements.
_RANK_BITS = tl.constexpr(9)  # ranks go up to 256
_RANK_MASK = tl.constexpr(511)


@triton.jit
def pack_group(b, rank, left):
    return (b << (2 * _RANK_BITS)) | (rank.to(tl.int64) << _RANK_BITS) | left.to(tl.int64)


@triton.jit
def read_groups(groups, nth, count, EK: tl.constexpr):
    """EK / GROUP (up to 4) groups from the nth of a list on; 0, which is no group, beyond it."""
    # Scalar by scalar: a vector of them would be copied through shared memory.
    a = tl.load(groups + nth, mask=nth < count, other=0)
    b = a * 0
    c = b
    d = b
    if EK >= 2 * GROUP:
        b = tl.load(groups + nth + 1, mask=nth + 1 < count, other=0)
    if EK >= 4 * GROUP:
        c = tl.load(groups + nth + 2, mask=nth + 2 < count, other=0)
        d = tl.load(groups + nth + 3, mask=nth + 3 < count, other=0)
    return a, b, c, d


@triton.jit
def read_list(
    row, list_id, part, group_count, groups, row_groups, list_length, part_rows, EK: tl.constexpr
):
    """A list's length, its first groups, and the first and the end of each row's own groups."""
    count = tl.load(group_count + list_id)
    own = tl.load(row_groups + part * part_rows + row)
    a, b, c, d = read_groups(groups + list_id * list_length, 0, count, EK)
    return count, own & 0xFFFF, own >> 16, a, b, c, d


@triton.jit
def load_groups(
    s, row, column, first, end, nth, group_a, group_b, group_c, group_d,
    pool, n, out_size, s_stride, split_stride,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr,
):  # fmt: skip
    """s [rows, EK] and B^T [EK, columns] of EK / GROUP groups, from a list's nth on.

    Args:
        row: sorted rows [rows]; s has their shrunk values from `column` on.
        first, end: of each row's own groups in the list.
        group_a, group_b, group_c, group_d: as `read_groups` gives them.
        n: the tile's output columns, which are rows of B [out_size, rank].
    """
    j = tl.arange(0, EK)
    of_group = j // GROUP
    packed = tl.where(of_group == 0, group_a, group_b)
    if EK >= 4 * GROUP:
        packed = tl.where(of_group < 2, packed, tl.where(of_group == 2, group_c, group_d))
    inside = j % GROUP < (packed & _RANK_MASK).to(tl.int32)
    rank = ((packed >> _RANK_BITS) & _RANK_MASK).to(tl.int32)
    b = packed >> (2 * _RANK_BITS)
    group = of_group + nth
    mine = (group[None, :] >= first[:, None]) & (group[None, :] < end[:, None]) & inside[None, :]
    there = inside[:, None] & (n < out_size)[None, :]
    shrunk_row = s + row.to(tl.int64) * s_stride + (column - first * GROUP)
    shrunk_at = shrunk_row[:, None] + (j + nth * GROUP)[None, :]
    factor_at = pool + b[:, None] + n[None, :] * rank[:, None] + (j % GROUP)[:, None]
    if ALIGNED:  # what the compiler can't see through loaded numbers: 16-byte loads are right
        shrunk_at = tl.max_contiguous(tl.multiple_of(shrunk_at, [1, 16]), [1, 8])
        mine = tl.max_constancy(mine, [1, 8])
        factor_at = tl.max_contiguous(tl.multiple_of(factor_at, [16, 1]), [8, 1])
        there = tl.max_constancy(there, [8, 1])
    shrunk = tl.load(shrunk_at, mask=mine, other=0.0)
    for split in tl.static_range(1, SPLITS):
        shrunk += tl.load(shrunk_at + split * split_stride, mask=mine, other=0.0)
    return shrunk, tl.load(factor_at, mask=there, other=0.0)


@triton.jit
def add_groups(
    acc, s, row, column, first, end, nth, group_a, group_b, group_c, group_d,
    pool, n, out_size, s_stride, split_stride,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] += s B^T for EK / GROUP groups; arguments as for `load_groups`."""
    shrunk, factors = load_groups(
        s, row, column, first, end, nth, group_a, group_b, group_c, group_d,
        pool, n, out_size, s_stride, split_stride, ALIGNED, SPLITS, EK,
    )  # fmt: skip
    return tl.dot(shrunk.to(DTYPE), factors.to(DTYPE), acc, input_precision="ieee")
