"""Shrink: s = scale * A x for every run of rows with one adapter, whatever its rank.

Its last program of each block writes the lists that the expand after it reads instead of the
tables (expand.py).

s is accumulated and scaled in float32, and rounded once, for the expand's dot. Where the inner
dimension is split, each split writes a float32 part of its own and the expand sums them: no
zero-fill, no atomics, one order of summation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import GROUP, pack_group
from .launch import pdl_launch_dependents, pdl_wait

# Which factor is read, and which row of x belongs to a sorted row.
GATE_UP = tl.constexpr(0)  # A13 of an expert; x [T, H] by the row's token
DOWN = tl.constexpr(1)  # A2 of an expert, transposed; x [rows, I] by the row itself
DENSE = tl.constexpr(2)  # A of a dense projection; x [T, in] by the row's token


@triton.jit
def run_rows(nth, count, end_row, place):
    """First row and end row of the nth of a block's runs, whose first rows lie at `place`."""
    first = tl.load(place + nth, mask=nth < count, other=0)
    after = tl.load(place + nth + 1, mask=nth + 1 < count, other=0)
    return first, tl.where(nth + 1 < count, after, end_row)


@triton.jit
def _list_part(
    list_id, part, block, first, end, b, rank, group_count, groups, row_groups, list_length,
    part_rows, BM: tl.constexpr,
):  # fmt: skip
    """Write one list: the groups of a block's runs [BM] in order, and which are each row's own."""
    in_run = (rank + GROUP - 1) // GROUP
    end_group = tl.cumsum(in_run, 0)
    first_group = end_group - in_run
    tl.store(group_count + list_id, tl.sum(in_run, 0))
    place = groups + list_id * list_length + first_group
    for nth in range(0, tl.max(in_run, 0)):
        packed = pack_group(b + nth * GROUP, rank, rank - nth * GROUP)
        tl.store(place + nth, packed, mask=nth < in_run)
    own = tl.where(in_run > 0, first_group | (end_group << 16), 0)
    ROWS: tl.constexpr = 32 if BM > 32 else BM  # a matrix of runs by rows at a time
    for from_row in range(0, BM, ROWS):
        row = block * BM + from_row + tl.arange(0, ROWS)
        of_row = (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
        tl.store(row_groups + part * part_rows + row, tl.sum(tl.where(of_row, own[:, None], 0), 0))


@triton.jit
def shrink_kernel(
    x, sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first,
    pool, offset_a, offset_b, ranks, scales, layout, s,
    group_count, groups, row_groups, list_length, part_rows,
    inner, out_size, top_k, table_columns, x_stride, s_stride, split_stride, part_stride,
    KIND: tl.constexpr, A_TRANSPOSED: tl.constexpr, FUSED_BIT: tl.constexpr,
    SHARED_BIT: tl.constexpr, ALIGNED: tl.constexpr, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (block and every PROGRAMS-th of its runs, dense projection, split).

    Adapters with SHARED_BIT go another way: what they share isn't shrunk here (GATE_UP), or not
    listed for the expand (DOWN).
    """
    block = tl.program_id(0) // (PROGRAMS + 1)
    program = tl.program_id(0) % (PROGRAMS + 1)
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

    if program == PROGRAMS:
        if split == 0:
            run = tl.arange(0, BM)
            first, end = run_rows(run, count, end_row, segment_first + block * BM)
            slot = tl.load(segment_slot + block * BM + run, mask=run < count, other=0)
            entry = slot.to(tl.int64) * table_columns + column
            a = tl.load(offset_a + entry, mask=run < count, other=-1)
            b = tl.load(offset_b + entry, mask=run < count, other=-1)
            present = (a >= 0) & (b >= 0)
            if KIND == DOWN and SHARED_BIT != 0:
                bits = tl.load(layout + slot, mask=present, other=0)
                present &= (bits & SHARED_BIT) == 0
            lists = (group_count, groups, row_groups, list_length, part_rows)
            if KIND == GATE_UP:
                gate = tl.load(ranks + entry * 3, mask=present, other=0)
                up = tl.load(ranks + entry * 3 + 1, mask=present, other=0)
                up_b = b + gate.to(tl.int64) * out_size
                _list_part(block * 2, 0, block, first, end, b, gate, *lists, BM)
                _list_part(block * 2 + 1, 1, block, first, end, up_b, up, *lists, BM)
            else:
                entry_rank = entry * 3 + 2 if KIND == DOWN else entry
                rank = tl.load(ranks + entry_rank, mask=present, other=0)
                list_id = block * tl.num_programs(1) + projection
                _list_part(list_id, projection, block, first, end, b, rank, *lists, BM)
        return

    part = tl.cdiv(inner, SPLITS * BK) * BK
    first_k = split * part
    end_k = tl.minimum(first_k + part, inner)
    # Runs of at most ROWS rows are shared out whole; in taller blocks each run's rows are.
    SHARE_ROWS: tl.constexpr = ROWS < BM
    for nth in range(0 if SHARE_ROWS else program, count, 1 if SHARE_ROWS else PROGRAMS):
        first, end = run_rows(nth, count, end_row, segment_first + block * BM)
        step = ROWS
        if SHARE_ROWS:
            first += (program + nth) % PROGRAMS * ROWS
            step = ROWS * PROGRAMS
        if first < end:
            slot = tl.load(segment_slot + block * BM + nth)
            entry = slot.to(tl.int64) * table_columns + column
            a = tl.load(offset_a + entry)
            b = tl.load(offset_b + entry)
            fused = False
            if KIND == GATE_UP:
                gate = tl.load(ranks + entry * 3)
                up = tl.load(ranks + entry * 3 + 1)
                scale = tl.load(scales + entry * 3)
                scale_up = tl.load(scales + entry * 3 + 1)
                fused = (tl.load(layout + slot) & FUSED_BIT) != 0
                rank = tl.where(fused, tl.maximum(gate, up), gate + up)
            elif KIND == DOWN:
                rank = tl.load(ranks + entry * 3 + 2)
                scale = tl.load(scales + entry * 3 + 2)
            else:
                rank = tl.load(ranks + entry)
                scale = tl.load(scales + entry)
            rank = tl.where((a >= 0) & (b >= 0), rank, 0)
            if KIND == GATE_UP and SHARED_BIT != 0:
                rank = tl.where((tl.load(layout + slot) & SHARED_BIT) == 0, rank, 0)
            if ALIGNED:  # lets the compiler see that 16-byte loads are right
                a = a // 8 * 8
                rank = rank // 8 * 8
            for first_row in range(first, end, step):
                row = first_row + tl.arange(0, ROWS)
                here = row < end
                source = row
                if KIND != DOWN:
                    pair = tl.load(sorted_pairs + row, mask=here, other=0)
                    source = pair // top_k
                x_row = x + source.to(tl.int64)[:, None] * x_stride
                s_row = s + split.to(tl.int64) * split_stride + row.to(tl.int64)[:, None] * s_stride
                s_row += projection * part_stride
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
                    dtype = s.dtype.element_ty
                    if KIND == GATE_UP:
                        # Gate's ranks first, then up's; one A for both gives both the same.
                        to_gate = here[:, None] & (r < gate)[None, :]
                        tl.store(s_row + r[None, :], (acc * scale).to(dtype), mask=to_gate)
                        up_r = tl.where(fused, r, r - gate)
                        to_up = here[:, None] & ((up_r >= 0) & (up_r < up) & (r < rank))[None, :]
                        place = s_row + part_stride + up_r[None, :]
                        tl.store(place, (acc * scale_up).to(dtype), mask=to_up)
                    else:
                        inside = here[:, None] & (r < rank)[None, :]
                        tl.store(s_row + r[None, :], (acc * scale).to(dtype), mask=inside)
