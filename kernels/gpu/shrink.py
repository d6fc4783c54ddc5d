"""Shrink: s = x A^T for every segment of a batch, whatever its rank.

A segment's rows have one adapter (and, on experts, one expert). s is float32 and unscaled: the
scale is applied where s is rounded, at the expand. Several splits of the inner dimension each write
a part of their own, which the expand sums: no zero-fill, no atomics, one order of summation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import pdl_launch_dependents, pdl_wait

# Which factor is read, and which row of x belongs to a sorted row.
GATE_UP = tl.constexpr(0)  # A13 of an expert; x [T, H] by the row's token
DOWN = tl.constexpr(1)  # A2 of an expert, transposed; x [rows, I] by the row itself
DENSE = tl.constexpr(2)  # A of a dense projection; x [T, in] by the row's token


@triton.jit
def shrink_kernel(
    x, sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first,
    pool, offset_a, offset_b, ranks, layout, s,
    inner, top_k, table_columns, x_stride, s_stride, split_stride, column_stride,
    KIND: tl.constexpr, A_TRANSPOSED: tl.constexpr, FUSED_BIT: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block and group, projection, split): every GROUPS-th segment of the block."""
    block = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    projection = tl.program_id(1)
    split = tl.program_id(2)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    if block >= tl.load(num_blocks):
        return
    end_row = tl.load(block_end + block)
    count = tl.load(segment_count + block)
    # On experts the tables' second index is the expert, else the projection.
    column = projection
    if KIND != DENSE:
        column = tl.load(block_expert + block)
    part = tl.cdiv(inner, SPLITS * BK) * BK
    first_k = split * part
    end_k = tl.minimum(first_k + part, inner)
    for nth in range(group, count, GROUPS):
        place = block * BM + nth
        slot = tl.load(segment_slot + place)
        first = tl.load(segment_first + place)
        end = tl.load(segment_first + place + 1, mask=nth + 1 < count, other=0)
        end = tl.where(nth + 1 < count, end, end_row)
        entry = slot.to(tl.int64) * table_columns + column
        a = tl.load(offset_a + entry)
        b = tl.load(offset_b + entry)
        if KIND == GATE_UP:
            gate = tl.load(ranks + entry * 3)
            up = tl.load(ranks + entry * 3 + 1)
            fused = (tl.load(layout + slot) & FUSED_BIT) != 0
            rank = tl.where(fused, tl.maximum(gate, up), gate + up)
        elif KIND == DOWN:
            rank = tl.load(ranks + entry * 3 + 2)
        else:
            rank = tl.load(ranks + entry)
        rank = tl.where((a >= 0) & (b >= 0), rank, 0)
        if ALIGNED:  # lets the compiler see that 16-byte loads are right
            a = a // 8 * 8
            rank = rank // 8 * 8
        for first_row in range(first, end, ROWS):
            row = first_row + tl.arange(0, ROWS)
            here = row < end
            source = row
            if KIND != DOWN:
                pair = tl.load(sorted_pairs + row, mask=here, other=0)
                source = pair // top_k
            x_row = x + source.to(tl.int64)[:, None] * x_stride
            for first_r in range(0, rank, BR):
                r = first_r + tl.arange(0, BR)
                acc = tl.zeros([ROWS, BR], tl.float32)
                for k0 in range(first_k, end_k, BK):
                    k = k0 + tl.arange(0, BK)
                    xs = tl.load(x_row + k[None, :], mask=here[:, None] & (k < end_k)[None, :],
                                 other=0.0)  # fmt: skip
                    inside = (k < end_k)[:, None] & (r < rank)[None, :]
                    if A_TRANSPOSED:
                        factor = pool + a + k.to(tl.int64)[:, None] * rank + r[None, :]
                    else:
                        factor = pool + a + r.to(tl.int64)[None, :] * inner + k[:, None]
                    factors = tl.load(factor, mask=inside, other=0.0).to(xs.dtype)
                    acc = tl.dot(xs, factors, acc, input_precision="ieee")
                out = s + split.to(tl.int64) * split_stride + row.to(tl.int64)[:, None] * s_stride
                out += projection * column_stride + r[None, :]
                tl.store(out, acc, mask=here[:, None] & (r < rank)[None, :])
