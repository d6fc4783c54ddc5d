"""What one step's batch says about adapters: built once a step, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .checks import INTEGER_TYPES, check
from .host import on_host


@dataclass(frozen=True)
class DenseSegments:
    """Runs of tokens with one adapter, for dense projections. Tokens of the base model are in none.

    Run i covers rows first_row[i] to end_row[i] of the batch taken in `order`. The runs are known
    on the host, as the batch's composition is.
    """

    num_tokens: int
    slot: np.ndarray  # int64 [n]
    first_row: np.ndarray  # int64 [n]
    end_row: np.ndarray  # int64 [n]
    host_order: np.ndarray | None  # int64 [T], token of each row; None = the tokens as they come
    order: torch.Tensor | None  # the same on the batch's device

    @classmethod
    def from_token_slot(cls, token_slot: torch.Tensor) -> DenseSegments:
        """Runs of `token_slot` (int32 [T]), which is sorted first if it isn't ordered by slot."""
        check("token_slot", token_slot, shape=(None,), dtype=INTEGER_TYPES)
        slots = on_host(token_slot).astype(np.int64)
        by_slot = order = None
        if (slots[1:] < slots[:-1]).any():
            by_slot = np.argsort(slots, kind="stable")
            slots = slots[by_slot]
            order = torch.from_numpy(by_slot).to(token_slot.device)
        edges = np.flatnonzero(np.diff(slots, prepend=-2, append=-2))
        first, end = edges[:-1], edges[1:]
        slot = slots[first]
        adapted = slot >= 0
        return cls(slots.size, slot[adapted], first[adapted], end[adapted], by_slot, order)


@dataclass(frozen=True)
class LoraBatch:
    """Adapter slot of each token of a step, and the runs that they form."""

    token_slot: torch.Tensor  # int32 [T], -1 = base model
    segments: DenseSegments

    @classmethod
    def from_token_slot(cls, token_slot: torch.Tensor) -> LoraBatch | None:
        """None if no token has an adapter: such a step does no LoRA work at all.

        Args:
            token_slot: int32 [T], -1 = base model. Best ordered by slot, so that no layer sorts.
        """
        segments = DenseSegments.from_token_slot(token_slot)
        return cls(token_slot, segments) if segments.slot.size else None
