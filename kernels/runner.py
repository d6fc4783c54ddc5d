"""The MoE layer as a pipeline of stages, with hook points where adapters (or anything else) act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables
from .moe_weights import MoeWeights

# (stage output to change in place, stage input, the backend's batch)
Hook = Callable[[torch.Tensor, torch.Tensor, Any], None]
Hooks = tuple[Hook, ...]


class MoeBackend(ABC):
    """The stages of a MoE layer. A backend writes the seven abstract ones; LoRA then acts between
    them. One that can fuse LoRA or the activation into a product overrides a half.

    Rows are the pairs of this rank in the backend's own order, which its batch describes.
    """

    @abstractmethod
    def align(
        self,
        topk_ids: torch.Tensor,
        lora_batch: LoraBatch | None,
        weights: MoeWeights,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The batch: rows of topk_ids [T, K] ordered by expert and slot. `dtype` is that of the
        activations; None: as the weights'."""

    @abstractmethod
    def gate_up(self, x: torch.Tensor, weights: MoeWeights, batch: Any) -> torch.Tensor:
        """x [T, H] -> h [rows, 2I]."""

    @abstractmethod
    def activate(self, h: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        """h [rows, 2I] -> a [rows, I]."""

    @abstractmethod
    def down(self, a: torch.Tensor, weights: MoeWeights, batch: Any) -> torch.Tensor:
        """a [rows, I] -> y [rows, H]."""

    @abstractmethod
    def combine(
        self, y: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, batch: Any
    ) -> torch.Tensor:
        """y [rows, H] -> [T, H], each token's rows summed by routing weight."""

    @abstractmethod
    def lora_gate_up_(
        self, h: torch.Tensor, x: torch.Tensor, batch: Any, tables: ExpertLoraTables
    ) -> None:
        """Add the adapters' part to h."""

    @abstractmethod
    def lora_down_(
        self, y: torch.Tensor, a: torch.Tensor, batch: Any, tables: ExpertLoraTables
    ) -> None:
        """Add the adapters' part to y."""

    def first_half(
        self,
        x: torch.Tensor,
        weights: MoeWeights,
        batch: Any,
        lora: ExpertLoraTables | None,
        hooks: Hooks,
    ) -> torch.Tensor:
        """From x [T, H] to the activated a [rows, I]."""
        h = self.gate_up(x, weights, batch)
        if lora is not None:
            self.lora_gate_up_(h, x, batch, lora)
        for hook in hooks:
            hook(h, x, batch)
        return self.activate(h, weights)

    def second_half(
        self,
        a: torch.Tensor,
        weights: MoeWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        batch: Any,
        lora: ExpertLoraTables | None,
        hooks: Hooks,
    ) -> torch.Tensor:
        """From a [rows, I] to the layer's output [T, H]."""
        y = self.down(a, weights, batch)
        if lora is not None:
            self.lora_down_(y, a, batch, lora)
        for hook in hooks:
            hook(y, a, batch)
        return self.combine(y, topk_weights, topk_ids, batch)


@dataclass(frozen=True)
class MoeRunner:
    """Runs a MoE layer on a backend: align, gate_up, (hooks), activate, down, (hooks), combine."""

    backend: MoeBackend
    after_gate_up: Hooks = ()  # on h [rows, 2I] and x [T, H]
    before_combine: Hooks = ()  # on y [rows, H] and a [rows, I]

    def __call__(
        self,
        x: torch.Tensor,
        weights: MoeWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        lora: ExpertLoraTables | None = None,
        lora_batch: LoraBatch | None = None,
    ) -> torch.Tensor:
        """One MoE layer. Shapes as in `fused_moe`; without both lora arguments, no LoRA work.

        Returns:
            [T, H]
        """
        if lora is None or lora_batch is None:
            lora = lora_batch = None
        batch = self.backend.align(topk_ids, lora_batch, weights, x.dtype)
        a = self.backend.first_half(x, weights, batch, lora, self.after_gate_up)
        return self.backend.second_half(
            a, weights, topk_weights, topk_ids, batch, lora, self.before_combine
        )
