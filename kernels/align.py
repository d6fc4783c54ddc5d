"""Order the (token, chosen expert) pairs of a step by expert and adapter slot."""

from __future__ import annotations

import torch

from .aligned import AlignedBatch, BlockSegments
from .backends import gpu
from .checks import check_token_slot, check_topk_ids
from .lora_batch import LoraBatch


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_slot: LoraBatch | torch.Tensor | None,
    block_size: int,
    num_experts: int,
) -> AlignedBatch:
    """Sort pairs by (expert, slot, pair), pad each expert's rows, and list the slots' runs.

    Cost grows with the pairs and the runs that they form, never with configured slots. On a GPU
    there is no host sync.

    Args:
        topk_ids: int32 or int64 [T, K], expert of each pair; -1 = not on this rank, left out.
        token_slot: adapter slot of each token: a LoraBatch made once a step, or int32 [T] with
            -1 = base model. None = all base.
        block_size: each expert's rows are padded to a multiple of this, a power of two.
        num_experts: experts on this rank, E.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check_topk_ids(topk_ids, num_experts)
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two, got {block_size}")
    if isinstance(token_slot, torch.Tensor):
        check_token_slot(token_slot, topk_ids.shape[0], topk_ids.device)
    elif token_slot is not None:
        check_token_slot(token_slot.token_slot, topk_ids.shape[0], topk_ids.device)
    if topk_ids.device.type != "cpu":
        if isinstance(token_slot, torch.Tensor):
            token_slot = LoraBatch.from_token_slot(token_slot)
        return gpu().align(topk_ids, token_slot, block_size, num_experts)
    slots = token_slot.token_slot if isinstance(token_slot, LoraBatch) else token_slot
    return _align_on_cpu(topk_ids, slots, block_size, num_experts)


def _align_on_cpu(
    topk_ids: torch.Tensor, token_slot: torch.Tensor | None, block_size: int, num_experts: int
) -> AlignedBatch:
    num_tokens, top_k = topk_ids.shape
    expert = topk_ids.reshape(-1).long()
    # One key per pair, (expert, slot + 1): a stable sort of it is the whole order. Pairs of
    # other ranks sort first and are cut off.
    key = expert << 32
    if token_slot is not None:
        key = (key.view(num_tokens, top_k) + (token_slot + 1).unsqueeze(1)).reshape(-1)
    key, pair = torch.sort(key, stable=True)
    skipped = int((expert < 0).sum())
    key, pair = key[skipped:], pair[skipped:]
    count = torch.bincount(key >> 32, minlength=num_experts)
    blocks = (count + block_size - 1) // block_size
    first_pair, first_row = count.cumsum(0) - count, (blocks.cumsum(0) - blocks) * block_size
    row = torch.arange(pair.numel()) + (first_row - first_pair)[key >> 32]
    num_blocks = int(blocks.sum())
    sorted_pairs = torch.full((num_blocks * block_size,), num_tokens * top_k, dtype=torch.int32)
    sorted_pairs[row] = pair.int()
    block_expert = torch.repeat_interleave(torch.arange(num_experts), blocks)
    block_first = torch.arange(num_blocks) * block_size
    last = (first_row + count)[block_expert]
    return AlignedBatch(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        block_size=block_size,
        sorted_pairs=sorted_pairs,
        block_expert=block_expert.int(),
        block_end=torch.minimum(block_first + block_size, last).int(),
        num_blocks=torch.tensor([num_blocks], dtype=torch.int32),
        segments=None
        if token_slot is None
        else _segments((key & 0xFFFFFFFF) - 1, row, num_blocks, block_size),
    )


def _segments(
    slot: torch.Tensor, row: torch.Tensor, num_blocks: int, block_size: int
) -> BlockSegments:
    """Runs of one slot within each block; `slot` and `row` by sorted pair."""
    block = row // block_size
    new = torch.ones_like(slot, dtype=torch.bool)
    new[1:] = (slot[1:] != slot[:-1]) | (block[1:] != block[:-1])
    start = (new & (slot >= 0)).nonzero().flatten()
    count = torch.bincount(block[start], minlength=num_blocks)
    nth = torch.arange(start.numel()) - (count.cumsum(0) - count)[block[start]]
    place = block[start] * block_size + nth
    slots, first = torch.full((2, num_blocks * block_size), -1, dtype=torch.int32)
    slots[place] = slot[start].int()
    first[place] = row[start].int()
    return BlockSegments(count.int(), slots, first)
