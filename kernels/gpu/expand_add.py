"""Expand as a pass of its own: out += scale * s B^T, where the base product can't take LoRA in."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import add_expand, segment_rows
from .launch import pdl_launch_dependents, pdl_wait
from .shrink import DENSE, DOWN, GATE_UP


@triton.jit
def expand_add_kernel(
    out, sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first,
    pool, offset_a, offset_b, ranks, scales, layout, s,
    size_0, size_1, size_2, size_3, table_columns,
    out_stride, s_stride, split_stride, column_stride,
    KIND: tl.constexpr, FUSED_BIT: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of columns, projection). Projections lie side by side in out.

    out is [rows, N] on experts; on dense projections [T, N], written by the row's token.
    """
    block = tl.program_id(0)
    projection = tl.program_id(2)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    if block >= tl.load(num_blocks):
        return
    size = tl.where(projection == 0, size_0, tl.where(projection == 1, size_1,
                    tl.where(projection == 2, size_2, size_3)))  # fmt: skip
    first_column = tl.where(projection > 0, size_0, 0) + tl.where(projection > 1, size_1, 0)
    first_column += tl.where(projection > 2, size_2, 0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    end_row = tl.load(block_end + block)
    count = tl.load(segment_count + block)
    row = block * BM + tl.arange(0, BM)
    acc = tl.zeros([BM, BN], tl.float32)
    for nth in range(0, count):
        first, end = segment_rows(block, nth, count, end_row, segment_first, BM)
        slot = tl.load(segment_slot + block * BM + nth)
        mine = (row >= first) & (row < end)
        column = projection * column_stride
        if KIND == DENSE:
            entry = slot.to(tl.int64) * table_columns + projection
            rank = tl.load(ranks + entry)
            scale = tl.load(scales + entry)
            b = tl.load(offset_b + entry)
        else:
            entry = slot.to(tl.int64) * table_columns + tl.load(block_expert + block)
            which = projection if KIND == GATE_UP else 2
            rank = tl.load(ranks + entry * 3 + which)
            scale = tl.load(scales + entry * 3 + which)
            b = tl.load(offset_b + entry)
        present = (tl.load(offset_a + entry) >= 0) & (b >= 0)
        if KIND == GATE_UP:
            rank_gate = tl.load(ranks + entry * 3)
            fused = (tl.load(layout + slot) & FUSED_BIT) != 0
            after_gate = projection * rank_gate
            column = tl.where(fused, 0, after_gate)
            b += after_gate.to(tl.int64) * size_0
        rank = tl.where(present, rank, 0)
        acc = add_expand(
            acc, s, row, mine, column, scale, pool, b, rank, n, size,
            s_stride, split_stride, ALIGNED, SPLITS, RC, DTYPE,
        )  # fmt: skip
    here = row < end_row
    target = row
    if KIND == DENSE:
        target = tl.load(sorted_pairs + row, mask=here, other=0)
    place = out + target.to(tl.int64)[:, None] * out_stride + first_column + n[None, :]
    inside = here[:, None] & (n < size)[None, :]
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + acc).to(before.dtype), mask=inside)
