"""What one step's batch says about adapters: built once a step, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from .aligned import AlignedBatch
from .checks import INTEGER_TYPES, check
from .host import on_host

# Tiles are measured for batches of so many adapters; others take the nearest.
TUNED_ADAPTERS = (1, 8, 64)


@dataclass(frozen=True)
class HostSegments:
    """Runs of tokens with one adapter, on the host. Tokens of the base model are in none.

    Run i covers rows first_row[i] to end_row[i] of the batch taken in `order`.
    """

    num_tokens: int
    slot: np.ndarray  # int64 [n]
    first_row: np.ndarray  # int64 [n]
    end_row: np.ndarray  # int64 [n]
    order: np.ndarray | None  # int64 [T], token of each row; None = the tokens as they come

    @classmethod
    def from_slots(cls, slots: np.ndarray) -> HostSegments:
        """Runs of `slots` (int64 [T]), which are sorted first if they aren't ordered."""
        order = None
        if (slots[1:] < slots[:-1]).any():
            order = np.argsort(slots, kind="stable")
            slots = slots[order]
        edges = np.flatnonzero(np.diff(slots, prepend=-2, append=-2))
        first, end = edges[:-1], edges[1:]
        slot = slots[first]
        adapted = slot >= 0
        return cls(slots.size, slot[adapted], first[adapted], end[adapted], order)


@dataclass(frozen=True)
class LoraBatch:
    """Adapter slot of each token of a step, and the order in which equal slots lie together."""

    token_slot: torch.Tensor  # int32 [T], -1 = base model
    order: torch.Tensor | None  # int32 [T], tokens by slot; None = as they come (or not on a GPU)
    num_adapters: int = 8  # about how many there are: a hint for tile sizes, nothing depends on it
    # Token blocks by block size, for dense projections on a GPU; filled as they are asked for.
    token_blocks: dict[int, AlignedBatch] = field(default_factory=dict, compare=False)

    @classmethod
    def from_token_slot(
        cls, token_slot: torch.Tensor, ordered: bool = False, num_adapters: int | None = None
    ) -> LoraBatch | None:
        """A step's batch. On a GPU nothing is read back, so that this can be captured in a graph.

        Args:
            token_slot: int32 [T], -1 = base model.
            ordered: the caller vouches that slots don't decrease along the batch, which saves a
                sort on a GPU.
            num_adapters: about how many adapters there are, if known: tiles are chosen by it.

        Returns:
            None if no token has an adapter, as far as can be seen from the host: such a step does
            no LoRA work at all. On a GPU the caller has to know, and to pass no LoraBatch.
        """
        check("token_slot", token_slot, shape=(None,), dtype=INTEGER_TYPES)
        if token_slot.device.type == "cpu":
            batch = cls(token_slot, None)
            return batch if batch.host_segments.slot.size else None
        order = None if ordered else token_slot.argsort(stable=True).int()
        if num_adapters is None:
            num_adapters = max(1, min(8, token_slot.numel()))
        return cls(token_slot.int().contiguous(), order, num_adapters)

    @cached_property
    def host_segments(self) -> HostSegments:
        return HostSegments.from_slots(on_host(self.token_slot).astype(np.int64))
