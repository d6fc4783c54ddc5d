"""The order of `moe_lora_align_block_size` with rows in place of blocks, planned on the host.

For CPU batches of a few hundred pairs the fixed cost of each torch operation is what counts;
numpy on the same memory takes a quarter of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .host import on_host
from .lora_batch import LoraBatch


@dataclass(frozen=True)
class RowBatch:
    """Pairs of one MoE layer, as rows ordered (expert, slot, pair) without padding.

    A pair is the number token * top_k + k. Rows of the base model come first within an expert.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    sorted_pairs: torch.Tensor  # int32 [rows]
    expert_first_row: torch.Tensor  # int32 [E + 1], expert e has rows [e] to [e + 1]
    segments: np.ndarray  # int32 [n, 4]: slot, expert, first row, end row; adapted rows only

    @cached_property
    def row_token(self) -> torch.Tensor:
        """int32 [rows]: token of each row."""
        return self.sorted_pairs // self.top_k


_NO_SEGMENTS = np.empty((0, 4), dtype=np.int32)


def align_on_host(
    topk_ids: torch.Tensor, lora_batch: LoraBatch | None, num_experts: int
) -> RowBatch:
    """Rows ordered (expert, slot, pair) without padding. Arguments are taken as checked.

    Raises:
        ValueError: an expert id is not below num_experts.
    """
    num_tokens, top_k = topk_ids.shape
    ids = np.maximum(on_host(topk_ids).reshape(-1), -1)
    counts = np.bincount(ids + 1, minlength=num_experts + 1)
    if counts.size > num_experts + 1:
        raise ValueError(f"topk_ids must be below num_experts = {num_experts}, got {ids.max()}")
    ends = counts.cumsum()
    skipped = ends[0]  # pairs of other ranks: they sort first
    order = None if lora_batch is None else lora_batch.host_segments.order
    if order is None:
        pairs = _stable_order(ids)[skipped:]
    else:
        place = _stable_order(ids.reshape(num_tokens, top_k)[order].reshape(-1))[skipped:]
        pairs = order[place // top_k] * top_k + place % top_k
    expert = ids[pairs]
    segments = _NO_SEGMENTS
    if lora_batch is not None and pairs.size:
        slot = on_host(lora_batch.token_slot)[pairs // top_k]
        segments = _segments(expert, slot)
    return RowBatch(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        sorted_pairs=_tensor(pairs, topk_ids),
        expert_first_row=_tensor(ends - skipped, topk_ids),
        segments=segments,
    )


def _stable_order(ids: np.ndarray) -> np.ndarray:
    # numpy sorts 16-bit integers by radix, several times faster than wider ones.
    return ids.astype(np.int16 if ids.size == 0 or ids.max() < 1 << 15 else np.int32).argsort(
        kind="stable"
    )


def _segments(expert: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """Runs of one (expert, slot) among rows, without those of the base model."""
    edge = (expert[1:] != expert[:-1]) | (slot[1:] != slot[:-1])
    inner = edge.nonzero()[0] + 1
    segments = np.empty((inner.size + 1, 4), dtype=np.int32)
    segments[0, 2] = 0
    segments[1:, 2] = inner
    segments[:-1, 3] = inner
    segments[-1, 3] = expert.size
    first = segments[:, 2]
    segments[:, 0] = slot[first]
    segments[:, 1] = expert[first]
    return segments[segments[:, 0] >= 0]


def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32, copy=False)).to(like.device)
