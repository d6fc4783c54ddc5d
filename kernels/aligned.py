"""A step's (token, chosen expert) pairs in the order in which a MoE layer works on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockSegments:
    """The runs of rows with one adapter, listed block by block; a run ends where its block does.

    Run i of block b stands at place b * block_size + i. It ends where the next one of the block
    starts, or at the block's end: within an expert, rows of the base model come first.
    """

    count: torch.Tensor  # int32 [blocks], runs of each block
    slot: torch.Tensor  # int32 [rows], adapter slot of each run
    first_row: torch.Tensor  # int32 [rows], first row of each run


@dataclass(frozen=True)
class AlignedBatch:
    """Pairs of one MoE layer, as rows ordered (expert, slot, pair) and padded per expert.

    A pair is the number token * top_k + k. Rows of the base model (slot -1) come first within an
    expert. Arrays are as long as the shapes ask at worst; what lies beyond the blocks and runs that
    are in use is undefined.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    block_size: int
    sorted_pairs: torch.Tensor  # int32 [rows], rows a multiple of block_size; T * K = padding
    block_expert: torch.Tensor  # int32 [blocks], expert of the rows of each block
    block_end: torch.Tensor  # int32 [blocks], where each block's rows that hold pairs end
    num_blocks: torch.Tensor  # int32 [1], blocks in use
    segments: BlockSegments | None  # None if no token slots were given

    @property
    def max_blocks(self) -> int:
        return self.sorted_pairs.numel() // self.block_size
