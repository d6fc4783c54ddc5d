"""Expand as a pass of its own: out += s B^T, where the base product can't take LoRA in."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import GROUP, add_groups, read_groups, read_list
from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def expand_add_kernel(
    out, sorted_pairs, block_end, num_blocks,
    pool, s, group_count, groups, row_groups, list_length, part_rows,
    s_stride, split_stride, part_stride,
    size_0, size_1, size_2, size_3, parts, out_stride,
    BY_TOKEN: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr, EK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, TILES tiles of columns of one part). Parts of the sizes given lie side by
    side in out, which is [rows, N] or, BY_TOKEN, [T, N].

    A program waits for three look-ups, one after another, before its first tile; its others are
    read while the one before is computed.
    """
    block = tl.program_id(0)
    nth = tl.program_id(1)
    chunks_0 = tl.cdiv(size_0, TILES * BN)
    chunks_1 = chunks_0 + tl.cdiv(size_1, TILES * BN)
    chunks_2 = chunks_1 + tl.cdiv(size_2, TILES * BN)
    part = (nth >= chunks_0).to(tl.int32) + (nth >= chunks_1) + (nth >= chunks_2)
    size = tl.where(part == 0, size_0, tl.where(part == 1, size_1,
                    tl.where(part == 2, size_2, size_3)))  # fmt: skip
    first_chunk = tl.where(part == 0, 0, tl.where(part == 1, chunks_0,
                           tl.where(part == 2, chunks_1, chunks_2)))  # fmt: skip
    first_column = tl.where(part > 0, size_0, 0) + tl.where(part > 1, size_1, 0)
    first_column += tl.where(part > 2, size_2, 0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    # What hangs on no other look-up first, so that it is in flight together; of a block that there
    # isn't, it is read and not used.
    row = block * BM + tl.arange(0, BM)
    blocks = tl.load(num_blocks)
    end_row = tl.load(block_end + block)
    target = row
    if BY_TOKEN:
        target = tl.load(sorted_pairs + row)
    list_id = block * parts + part
    lists = (group_count, groups, row_groups, list_length, part_rows)
    count, first, end, ga, gb, gc, gd = read_list(row, list_id, part, *lists, EK)
    if block < blocks and count > 0:
        n = (nth - first_chunk) * (TILES * BN) + tl.arange(0, BN)
        here = row < end_row
        target = tl.where(here, target, 0)
        place = out + target.to(tl.int64)[:, None] * out_stride + first_column + n[None, :]
        before = tl.load(place, mask=here[:, None] & (n < size)[None, :], other=0.0)
        STEP: tl.constexpr = EK // GROUP
        for tile in range(TILES):
            coming = before
            if TILES > 1:
                ahead = here[:, None] & (n + BN < size)[None, :]
                coming = tl.load(place + BN, mask=ahead & (tile + 1 < TILES), other=0.0)
            acc = tl.zeros([BM, BN], tl.float32)
            a, b, c, d = ga, gb, gc, gd
            for group in tl.range(0, count, STEP):
                following = read_groups(groups + list_id * list_length, group + STEP, count, EK)
                acc = add_groups(
                    acc, s, row, part * part_stride, first, end, group, a, b, c, d,
                    pool, n, size, s_stride, split_stride, ALIGNED, SPLITS, EK, DTYPE,
                )  # fmt: skip
                a, b, c, d = following
            inside = here[:, None] & (n < size)[None, :]
            tl.store(place, (before.to(tl.float32) + acc).to(before.dtype), mask=inside)
            before = coming
            n += BN
            place += BN
