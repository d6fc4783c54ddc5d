"""What one step's batch says about adapters: built once a step, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import check_token_slot


@dataclass(frozen=True)
class DenseSegments:
    """Runs of tokens with one adapter, for dense projections. Tokens of the base model are in none.

    Run i covers rows first_row[i] .. end_row[i] of the batch taken in `order`.
    """

    num_tokens: int
    slot: torch.Tensor  # int64 [n]
    first_row: torch.Tensor  # int64 [n]
    end_row: torch.Tensor  # int64 [n]
    order: torch.Tensor | None  # int64 [T], token of each row; None = rows are the tokens as given

    @classmethod
    def from_token_slot(cls, token_slot: torch.Tensor) -> DenseSegments:
        """Runs of `token_slot` (int32 [T]), which is sorted first unless each slot is one run."""
        check_token_slot(token_slot, token_slot.numel(), token_slot.device)
        order = None
        slot, length = torch.unique_consecutive(token_slot, return_counts=True)
        if slot.numel() != torch.unique(slot).numel():
            in_order, order = torch.sort(token_slot, stable=True)
            slot, length = torch.unique_consecutive(in_order, return_counts=True)
        end_row = length.cumsum(0)
        adapted = slot >= 0
        return cls(
            num_tokens=token_slot.numel(),
            slot=slot[adapted].long(),
            first_row=(end_row - length)[adapted],
            end_row=end_row[adapted],
            order=order,
        )


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
        return cls(token_slot, segments) if segments.slot.numel() else None
