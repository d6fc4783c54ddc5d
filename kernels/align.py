"""Order the (token, chosen expert) pairs of a step by expert and adapter slot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .checks import check_token_slot, check_topk_ids


@dataclass(frozen=True)
class AlignedBatch:
    """Pairs of one MoE layer, as rows ordered (expert, slot, pair) and padded per expert.

    A pair is the number token * top_k + k. Rows of the base model (slot -1) come first within an
    expert. Arrays may be longer than what the counts say is in use; what lies beyond is undefined
    for `block_expert` and `segments`, and padding in `sorted_pairs`.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    block_size: int
    sorted_pairs: torch.Tensor  # int32 [rows], rows a multiple of block_size; T * K = padding
    block_expert: torch.Tensor  # int32 [blocks], expert of the rows of each block
    expert_first_row: torch.Tensor  # int32 [num_experts + 1], expert e has rows [e] to [e + 1]
    segments: torch.Tensor  # int32 [n, 4]: slot, expert, first row, end row; adapted rows only
    num_blocks: torch.Tensor  # int32 [1]
    num_segments: torch.Tensor  # int32 [1]

    @cached_property
    def row_token(self) -> torch.Tensor:
        """int32 [rows]: token of each row; num_tokens = padding."""
        return self.sorted_pairs // self.top_k


def moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_slot: torch.Tensor | None,
    block_size: int,
    num_experts: int,
) -> AlignedBatch:
    """Sort pairs by (expert, slot, pair), pad each expert's rows, and list the slot segments.

    Cost grows with the pairs and the segments that they form, never with configured slots.

    Args:
        topk_ids: int32 [T, K], expert of each pair; -1 = not on this rank, left out.
        token_slot: int32 [T], adapter slot of each token, -1 = base model; None = all base.
        block_size: each expert's rows are padded to a multiple of this.
        num_experts: experts on this rank, E.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check_topk_ids(topk_ids, num_experts)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if token_slot is not None:
        check_token_slot(token_slot, topk_ids.shape[0], topk_ids.device)
    num_tokens, top_k = topk_ids.shape
    device = topk_ids.device
    expert = topk_ids.reshape(-1).long()
    # One key per pair, (expert, slot + 1): a stable sort of it is the whole order. Pairs of
    # other ranks sort first and are cut off.
    key = expert << 32
    if token_slot is not None:
        key = key.view(num_tokens, top_k) + (token_slot + 1).unsqueeze(1)
    key, pair = torch.sort(key.reshape(-1), stable=True)
    edges = torch.arange(num_experts + 1, device=device) << 32
    first_pair = torch.searchsorted(key, edges)  # of each expert, among sorted pairs
    if num_tokens * top_k and int(first_pair[0]):
        skipped = int(first_pair[0])
        key, pair, first_pair = key[skipped:], pair[skipped:], first_pair - skipped

    if block_size == 1:
        row = None
        first_row = first_pair
        sorted_pairs = pair.int()
        block_expert = (key >> 32).int()
    else:
        padded = (first_pair.diff() + (block_size - 1)) // block_size * block_size
        first_row = torch.nn.functional.pad(padded.cumsum(0), (1, 0))
        row = torch.arange(pair.numel(), device=device)
        row += (first_row - first_pair)[key >> 32]
        sorted_pairs = torch.full(
            (int(first_row[-1]),), num_tokens * top_k, dtype=torch.int32, device=device
        )
        sorted_pairs[row] = pair.int()
        block_expert = torch.repeat_interleave(
            torch.arange(num_experts, dtype=torch.int32, device=device), padded // block_size
        )
    if token_slot is None:
        segments = torch.empty(0, 4, dtype=torch.int32, device=device)
    else:
        segments = _segments(key, row)
    return AlignedBatch(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        block_size=block_size,
        sorted_pairs=sorted_pairs,
        block_expert=block_expert,
        expert_first_row=first_row.int(),
        segments=segments,
        num_blocks=torch.tensor([block_expert.numel()], dtype=torch.int32, device=device),
        num_segments=torch.tensor([segments.shape[0]], dtype=torch.int32, device=device),
    )


def _segments(key: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    """Runs of one key with a slot, as int32 [n, 4]; `row` maps sorted pairs to padded rows."""
    runs, lengths = torch.unique_consecutive(key, return_counts=True)
    last = lengths.cumsum(0)
    first = last - lengths
    if row is not None:
        first = row[first]
    slot = (runs & 0xFFFFFFFF) - 1
    segments = torch.stack((slot, runs >> 32, first, first + lengths), 1)
    return segments[slot >= 0].int()
