"""The MoE layer as a pipeline of stages, with hook points where adapters (or anything else) act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from . import torch_backend
from .align import AlignedBatch
from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables


class MoeBackend(Protocol):
    """The stages. A backend that can't fuse LoRA into them gets it through its two hooks."""

    def align(
        self, topk_ids: torch.Tensor, lora_batch: LoraBatch | None, num_experts: int
    ) -> AlignedBatch: ...
    def gate_up(self, x: torch.Tensor, w13: torch.Tensor, batch: AlignedBatch) -> torch.Tensor: ...
    def activate(self, h: torch.Tensor) -> torch.Tensor: ...
    def down(self, a: torch.Tensor, w2: torch.Tensor, batch: AlignedBatch) -> torch.Tensor: ...
    def combine(
        self, y: torch.Tensor, topk_weights: torch.Tensor, batch: AlignedBatch
    ) -> torch.Tensor: ...
    def lora_gate_up_(
        self, h: torch.Tensor, x: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
    ) -> None: ...
    def lora_down_(
        self, y: torch.Tensor, a: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
    ) -> None: ...


# (stage output to change in place, stage input, batch)
Hook = Callable[[torch.Tensor, torch.Tensor, AlignedBatch], None]


@dataclass(frozen=True)
class MoeRunner:
    """Runs one MoE layer: align, gate_up, (hooks), activate, down, (hooks), combine."""

    backend: MoeBackend = torch_backend
    after_gate_up: tuple[Hook, ...] = ()  # on h [rows, 2I] and x [T, H]
    before_combine: tuple[Hook, ...] = ()  # on y [rows, H] and a [rows, I]

    def __call__(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        lora: ExpertLoraTables | None = None,
        lora_batch: LoraBatch | None = None,
    ) -> torch.Tensor:
        """One MoE layer. Shapes as in `fused_moe`; without both lora arguments, no LoRA work.

        Returns:
            [T, H]
        """
        stages = self.backend
        if lora is None:
            lora_batch = None
        batch = stages.align(topk_ids, lora_batch, w13.shape[0])
        h = stages.gate_up(x, w13, batch)
        if lora is not None and lora_batch is not None:
            stages.lora_gate_up_(h, x, batch, lora)
        for hook in self.after_gate_up:
            hook(h, x, batch)
        a = stages.activate(h)
        y = stages.down(a, w2, batch)
        if lora is not None and lora_batch is not None:
            stages.lora_down_(y, a, batch, lora)
        for hook in self.before_combine:
            hook(y, a, batch)
        return stages.combine(y, topk_weights, batch)
