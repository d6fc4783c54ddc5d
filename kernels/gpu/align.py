"""Order a step's (token, chosen expert) pairs by expert and adapter slot, on the GPU.

Both ways below give the same result without a host sync. Slots need no sort here: the tokens'
order by slot is known once per step (`LoraBatch`), and a counting sort by expert that is stable in
that order yields rows ordered (expert, slot).
"""

from __future__ import annotations

import torch

from ..align import AlignedBatch, BlockSegments
from ..lora_batch import LoraBatch
from .align_kernels import (
    blocks_kernel,
    count_kernel,
    one_launch_kernel,
    scan_kernel,
    scatter_kernel,
)
from .launch import USE_PDL, cdiv, next_power_of_2

# Up to this many pairs one launch, in which every expert's program reads all ids, is faster than
# the four launches of a chunked counting sort.
ONE_LAUNCH_PAIRS = 4096
CHUNK_PAIRS = 128  # pairs that one program of the chunked sort counts and scatters


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
    one_launch_kernel[(batch.num_experts,)](
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
    count_kernel[(chunks,)](
        ids, ordering, counts, pairs, batch.top_k, batch.num_experts,
        CHUNK=CHUNK_PAIRS, **flags, launch_pdl=USE_PDL,
    )  # fmt: skip
    at_once = min(experts, 8)
    scan_kernel[(experts // at_once,)](
        counts, totals, chunks, EXPERTS=experts, AT_ONCE=at_once, PDL=USE_PDL,
        launch_pdl=USE_PDL,
    )  # fmt: skip
    outputs = _outputs(batch, row_slot)
    segments = batch.segments is not None
    scatter_kernel[(chunks,)](
        ids, ordering, ids if token_slot is None else token_slot, counts, totals,
        outputs[0], outputs[7], pairs, batch.top_k, batch.num_experts,
        BM=batch.block_size, CHUNK=CHUNK_PAIRS, SEGMENTS=segments, **flags,
        num_warps=8, launch_pdl=USE_PDL,
    )  # fmt: skip
    blocks_kernel[(batch.max_blocks,)](
        totals, *outputs, pairs, batch.num_experts,
        BM=batch.block_size, EXPERTS=experts, SEGMENTS=segments, PDL=USE_PDL,
        num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip
