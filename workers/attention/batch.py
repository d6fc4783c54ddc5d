"""What all layers of a step share for attention, by device."""

from __future__ import annotations

from typing import Protocol

import torch

from ..step import SequenceStep
from .padded import PaddedBatch
from .paged import PagedBatch


class AttentionBatch(Protocol):
    """One step's sequences, and attention over one layer's part of the cache.

    k_cache is [blocks, block_size, KVH, D], v_cache [..., DV].
    """

    def write(
        self, k: torch.Tensor, v: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Writes k [T, KVH, D] and v [T, KVH, DV] of the new tokens; v is None where v_cache is a
        part of k_cache."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
        latent: bool,
    ) -> torch.Tensor:
        """[T, H * DV] of q [T, H, D]; the arguments are those of `PagedKVCache.attend`."""
        ...


def plan_attention(
    sequences: list[SequenceStep], block_size: int, device: torch.device
) -> AttentionBatch:
    """Lays out one step's attention.

    Args:
        sequences: in batch order; their rows follow each other.
    """
    of_device = PaddedBatch if device.type == "cpu" else PagedBatch
    return of_device.plan(sequences, block_size, device)
