"""The kernels of `align`: one launch for a few pairs, a counting sort in chunks for many."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import pdl_launch_dependents, pdl_wait


@triton.jit
def _load_ids(ids, order, place, pairs, top_k, num_experts, ORDERED: tl.constexpr):
    """Pair at each place of the order by slot, and its expert (-1: none here)."""
    if ORDERED:
        pair = place
    else:
        token = tl.load(order + place // top_k, mask=place < pairs, other=0).to(tl.int32)
        pair = token * top_k + place % top_k
    expert = tl.load(ids + pair, mask=place < pairs, other=-1).to(tl.int32)
    return pair, tl.where(expert < num_experts, expert, -1)


@triton.jit
def _list_block(
    block, expert, first, end,
    sorted_pairs, block_expert, block_end, segment_count, segment_slot, segment_first, row_slot,
    pairs, BM: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What there is to say of one block, whose rows `first` to `end` hold pairs."""
    tl.store(block_expert + block, expert)
    tl.store(block_end + block, end)
    row = first + tl.arange(0, BM)
    if SEGMENTS:
        slot = tl.load(row_slot + row, mask=row < end, other=-1)
        before = tl.load(row_slot + row - 1, mask=(row > first) & (row < end), other=-1)
        start = (slot >= 0) & (slot != before)
        place = block * BM + tl.cumsum(start.to(tl.int32), 0) - 1
        tl.store(segment_slot + place, slot, mask=start)
        tl.store(segment_first + place, row, mask=start)
        tl.store(segment_count + block, tl.sum(start.to(tl.int32), 0))
    tl.store(sorted_pairs + row, pairs, mask=row >= end)


@triton.jit(do_not_specialize=["pairs"])
def one_launch_kernel(
    ids, order, token_slot,
    sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first, row_slot,
    pairs, top_k, num_experts,
    BM: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
    ORDERED: tl.constexpr, SEGMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    column = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for chunk in range(0, pairs, CHUNK):
        # Counting needs no order.
        place = chunk + tl.arange(0, CHUNK)
        found = tl.load(ids + place, mask=place < pairs, other=-1).to(tl.int32)
        inside = (found >= 0) & (found < num_experts)
        counts += tl.histogram(tl.where(inside, found, 0), EXPERTS, mask=inside)
    blocks = (counts + BM - 1) // BM
    first_block = tl.sum(tl.where(column < expert, blocks, 0), 0)
    count = tl.sum(tl.where(column == expert, counts, 0), 0)
    if expert == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))

    first = first_block * BM
    seen = tl.zeros([], tl.int32)
    for chunk in range(0, pairs, CHUNK):
        place = chunk + tl.arange(0, CHUNK)
        pair, found = _load_ids(ids, order, place, pairs, top_k, num_experts, ORDERED)
        mine = found == expert
        row = first + seen + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(sorted_pairs + row, pair, mask=mine)
        if SEGMENTS:
            slot = tl.load(token_slot + pair // top_k, mask=mine, other=-1).to(tl.int32)
            tl.store(row_slot + row, slot, mask=mine)
        seen += tl.sum(mine.to(tl.int32), 0)
    if SEGMENTS:
        tl.debug_barrier()  # the rows' slots are read back by other threads
    for nth in range(0, (count + BM - 1) // BM):
        start = first + nth * BM
        _list_block(
            first_block + nth, expert, start, tl.minimum(start + BM, first + count),
            sorted_pairs, block_expert, block_end,
            segment_count, segment_slot, segment_first, row_slot, pairs, BM, SEGMENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    ids, order, counts, pairs, top_k, num_experts,
    CHUNK: tl.constexpr, EXPERTS: tl.constexpr, ORDERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts[chunk, expert]: the chunk's pairs of each expert."""
    chunk = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    _, found = _load_ids(ids, order, place, pairs, top_k, num_experts, ORDERED)
    found_here = tl.histogram(tl.where(found >= 0, found, 0), EXPERTS, mask=found >= 0)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), found_here)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    counts, totals, chunks, EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr
):
    """Turn counts into each chunk's first place among its experts' pairs, and sum them."""
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    column = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE], tl.int32)
    for first in range(0, chunks, 128):
        chunk = first + tl.arange(0, 128)
        place = counts + chunk[:, None] * EXPERTS + column[None, :]
        inside = (chunk < chunks)[:, None] & (column >= 0)[None, :]
        here = tl.load(place, mask=inside, other=0)
        tl.store(place, total[None, :] + tl.cumsum(here, 0) - here, mask=inside)
        total += tl.sum(here, 0)
    tl.store(totals + column, total)


@triton.jit(do_not_specialize=["pairs"])
def scatter_kernel(
    ids, order, token_slot, counts, totals, sorted_pairs, row_slot, pairs, top_k, num_experts,
    BM: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
    ORDERED: tl.constexpr, SEGMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write each of a chunk's pairs to its row."""
    chunk = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    column = tl.arange(0, EXPERTS)
    total = tl.load(totals + column)
    padded = (total + BM - 1) // BM * BM
    first = tl.cumsum(padded, 0) - padded + tl.load(counts + chunk * EXPERTS + column)
    nth = tl.arange(0, CHUNK)
    place = chunk * CHUNK + nth
    pair, found = _load_ids(ids, order, place, pairs, top_k, num_experts, ORDERED)
    row = tl.gather(first, tl.maximum(found, 0), 0)
    # Earlier pairs of the chunk with the same expert.
    for other in range(0, CHUNK, 64):
        other_nth = other + tl.arange(0, 64)
        other_place = chunk * CHUNK + other_nth
        _, other_found = _load_ids(ids, order, other_place, pairs, top_k, num_experts, ORDERED)
        # Summed along the first axis, which threads hold whole.
        same = (found[None, :] == other_found[:, None]) & (nth[None, :] > other_nth[:, None])
        row += tl.sum(same.to(tl.int32), 0)
    tl.store(sorted_pairs + row, pair, mask=found >= 0)
    if SEGMENTS:
        slot = tl.load(token_slot + pair // top_k, mask=found >= 0, other=-1).to(tl.int32)
        tl.store(row_slot + row, slot, mask=found >= 0)


@triton.jit(do_not_specialize=["pairs"])
def blocks_kernel(
    totals,
    sorted_pairs, block_expert, block_end, num_blocks,
    segment_count, segment_slot, segment_first, row_slot,
    pairs, num_experts,
    BM: tl.constexpr, EXPERTS: tl.constexpr, SEGMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """List one block."""
    block = tl.program_id(0)
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    column = tl.arange(0, EXPERTS)
    total = tl.load(totals + column)
    blocks = (total + BM - 1) // BM
    end_block = tl.cumsum(blocks, 0)
    if block == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))
    if block < tl.sum(blocks, 0):
        expert = tl.sum((end_block <= block).to(tl.int32), 0)
        mine = column == expert
        first_block = tl.sum(tl.where(mine, end_block - blocks, 0), 0)
        count = tl.sum(tl.where(mine, total, 0), 0)
        first = block * BM
        _list_block(
            block, expert, first, tl.minimum(first + BM, first_block * BM + count),
            sorted_pairs, block_expert, block_end,
            segment_count, segment_slot, segment_first, row_slot, pairs, BM, SEGMENTS,
        )  # fmt: skip
