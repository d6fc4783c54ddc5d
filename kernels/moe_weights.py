"""What a MoE layer's base model is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import FLOAT_TYPES, check


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's activation: (up + 1) * gate * sigmoid(alpha * gate), with gate clamped to at most
    `limit` and up to +-limit."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class MoeWeights:
    """Experts of one layer on this rank."""

    w13: torch.Tensor  # [E, 2I, H], gate rows first
    w2: torch.Tensor  # [E, H, I]
    w13_bias: torch.Tensor | None = None  # [E, 2I]
    w2_bias: torch.Tensor | None = None  # [E, H]; under TP on one rank only
    clamped: ClampedSwiglu | None = None  # None = silu(gate) * up

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    def check(self, x: torch.Tensor) -> None:
        """Raise ValueError, naming the argument, unless shapes, dtypes and devices fit x [T, H]."""
        check("x", x, shape=(None, None), dtype=FLOAT_TYPES)
        same = {"dtype": x.dtype, "device": x.device}
        check("w13", self.w13, shape=(None, None, x.shape[1]), **same)
        experts, rows, hidden = self.w13.shape
        if rows % 2:
            raise ValueError(f"w13 must have gate and up rows (an even number), got {rows}")
        check("w2", self.w2, shape=(experts, hidden, rows // 2), **same)
        if self.w13_bias is not None:
            check("w13_bias", self.w13_bias, shape=(experts, rows), device=x.device)
        if self.w2_bias is not None:
            check("w2_bias", self.w2_bias, shape=(experts, hidden), device=x.device)
