"""Order a step's (token, chosen expert) pairs by expert and adapter slot, on the GPU.

Both ways below give the same result without a host sync. Slots need no sort here: the tokens'
order by slot is known once per step (`LoraBatch`), and a counting sort by expert that is stable in
that order yields rows ordered (expert, slot).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..align import AlignedBatch, BlockSegments
from ..lora_batch import LoraBatch
from .launch import USE_PDL, cdiv, next_power_of_2, pdl_launch_dependents, pdl_wait

# Up to this many pairs one launch, in which every expert's program reads all ids, is faster than
# the four launches of a chunked counting sort.
ONE_LAUNCH_PAIRS = 4096
CHUNK_PAIRS = 256  # pairs that one program of the chunked sort counts and scatters


def align(
    topk_ids: torch.Tensor, lora_batch: LoraBatch | None, block_size: int, num_experts: int
) -> AlignedBatch:
    """`moe_lora_align_block_size` for CUDA tensors. Arguments are taken as checked."""
    num_tokens, top_k = topk_ids.shape
    pairs = num_tokens * top_k
    ids = topk_ids if topk_ids.is_contiguous() else topk_ids.contiguous()
    max_blocks = (pairs + min(num_experts, pairs) * (block_size - 1)) // block_size
    rows = max_blocks * block_size

    # One allocation: an allocation costs the host more than it costs the device.
    sizes = [rows, max_blocks, max_blocks, 1]
    if lora_batch is not None:
        sizes += [max_blocks, rows, rows, rows]
    # Every part starts at 16 bytes, so that kernels are compiled once whatever the sizes.
    parts = torch.empty(sum(-(-n // 4) * 4 for n in sizes), dtype=torch.int32, device=ids.device)
    parts = parts.split([-(-n // 4) * 4 for n in sizes])
    sorted_pairs, block_expert, block_end, num_blocks = parts[:4]
    segments = order = token_slot = row_slot = None
    if lora_batch is not None:
        count, slot, first_row, row_slot = parts[4:]
        segments = BlockSegments(count, slot, first_row)
        order, token_slot = lora_batch.order, lora_batch.token_slot
    batch = AlignedBatch(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        block_size=block_size,
        sorted_pairs=sorted_pairs,
        block_expert=block_expert,
        block_end=block_end,
        num_blocks=num_blocks[:1],
        segments=segments,
    )
    inputs = (ids, order, token_slot)
    if pairs == 0:
        num_blocks.zero_()
    elif pairs <= ONE_LAUNCH_PAIRS:
        _align_in_one_launch(batch, row_slot, *inputs)
    else:
        _align_in_chunks(batch, row_slot, *inputs)
    return batch


def _outputs(batch: AlignedBatch, row_slot: torch.Tensor | None) -> tuple:
    """Kernel arguments; where there are no segments, any pointer stands in."""
    pairs, segments = batch.sorted_pairs, batch.segments
    if segments is None:
        return pairs, batch.block_expert, batch.block_end, batch.num_blocks, *(pairs,) * 4
    return (
        pairs,
        batch.block_expert,
        batch.block_end,
        batch.num_blocks,
        segments.count,
        segments.slot,
        segments.first_row,
        row_slot,
    )


def _align_in_one_launch(batch: AlignedBatch, row_slot, ids, order, token_slot) -> None:
    pairs = batch.num_tokens * batch.top_k
    # Two sizes, so that few variants are compiled.
    chunk = 512 if pairs <= 512 else 1024
    _one_launch_kernel[(batch.num_experts,)](
        ids,
        ids if order is None else order,
        ids if token_slot is None else token_slot,
        *_outputs(batch, row_slot),
        pairs,
        batch.top_k,
        batch.num_experts,
        BM=batch.block_size,
        CHUNK=chunk,
        EXPERTS=next_power_of_2(max(batch.num_experts, 2)),
        ORDERED=order is None,
        SEGMENTS=batch.segments is not None,
        PDL=USE_PDL,
        num_warps=4 if chunk == 512 else 8,
        launch_pdl=USE_PDL,
    )


def _align_in_chunks(batch: AlignedBatch, row_slot, ids, order, token_slot) -> None:
    pairs = batch.num_tokens * batch.top_k
    experts = next_power_of_2(max(batch.num_experts, 2))
    chunks = cdiv(pairs, CHUNK_PAIRS)
    counts = torch.empty((chunks + 1) * experts, dtype=torch.int32, device=ids.device)
    totals = counts[chunks * experts :]
    ordering = ids if order is None else order
    flags = {"ORDERED": order is None, "EXPERTS": experts, "PDL": USE_PDL}
    _count_kernel[(chunks,)](
        ids, ordering, counts, pairs, batch.top_k, batch.num_experts,
        CHUNK=CHUNK_PAIRS, **flags, launch_pdl=USE_PDL,
    )  # fmt: skip
    at_once = min(experts, 8)
    _scan_kernel[(experts // at_once,)](
        counts, totals, chunks, EXPERTS=experts, AT_ONCE=at_once, PDL=USE_PDL,
        launch_pdl=USE_PDL,
    )  # fmt: skip
    outputs = _outputs(batch, row_slot)
    segments = batch.segments is not None
    _scatter_kernel[(chunks,)](
        ids, ordering, ids if token_slot is None else token_slot, counts, totals,
        outputs[0], outputs[7], pairs, batch.top_k, batch.num_experts,
        BM=batch.block_size, CHUNK=CHUNK_PAIRS, SEGMENTS=segments, **flags,
        num_warps=8, launch_pdl=USE_PDL,
    )  # fmt: skip
    _blocks_kernel[(batch.max_blocks,)](
        totals, *outputs, pairs, batch.num_experts,
        BM=batch.block_size, EXPERTS=experts, SEGMENTS=segments, PDL=USE_PDL,
        num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip


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
def _one_launch_kernel(
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
def _count_kernel(
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
def _scan_kernel(
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
def _scatter_kernel(
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
def _blocks_kernel(
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
