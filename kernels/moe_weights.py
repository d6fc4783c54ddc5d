"""What a MoE layer's base model is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_fp8 import FP8, FP8_BLOCK, fp8_blocks
from .checks import FLOAT_TYPES, check


@dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's activation: (up + 1) * gate * sigmoid(alpha * gate), with gate clamped to at most
    `limit` and up to +-limit."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class MoeWeights:
    """Experts of one layer on this rank.

    Weights are in the dtype of the activations, or FP8 with scales as `block_fp8` says. FP8 is for
    the weights alone: small batches are bound by their bytes, which it halves, and activations that
    aren't quantised leave the products as exact as those of the dequantised weights.
    """

    w13: torch.Tensor  # [E, 2I, H], gate rows first
    w2: torch.Tensor  # [E, H, I]
    w13_bias: torch.Tensor | None = None  # [E, 2I]
    w2_bias: torch.Tensor | None = None  # [E, H]; under TP on one rank only
    clamped: ClampedSwiglu | None = None  # None = silu(gate) * up
    w13_scale: torch.Tensor | None = None  # float32 [E, 2I / 128, H / 128], of FP8 alone
    w2_scale: torch.Tensor | None = None  # float32 [E, H / 128, I / 128]; both rounded up

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    @property
    def fp8(self) -> bool:
        return self.w13.dtype == FP8

    def check(self, x: torch.Tensor) -> None:
        """Raise ValueError, naming the argument, unless shapes, dtypes and devices fit x [T, H]."""
        check("x", x, shape=(None, None), dtype=FLOAT_TYPES)
        same = {"dtype": FP8 if self.fp8 else x.dtype, "device": x.device}
        check("w13", self.w13, shape=(None, None, x.shape[1]), **same)
        experts, rows, hidden = self.w13.shape
        if rows % 2:
            raise ValueError(f"w13 must have gate and up rows (an even number), got {rows}")
        check("w2", self.w2, shape=(experts, hidden, rows // 2), **same)
        self._check_scales(x.device)
        if self.w13_bias is not None:
            check("w13_bias", self.w13_bias, shape=(experts, rows), device=x.device)
        if self.w2_bias is not None:
            check("w2_bias", self.w2_bias, shape=(experts, hidden), device=x.device)

    def _check_scales(self, device: torch.device) -> None:
        scales = {"w13": self.w13_scale, "w2": self.w2_scale}
        for name, scale in scales.items():
            if (scale is not None) != self.fp8:
                wanted = "must be given with FP8 weights" if self.fp8 else "is for FP8 weights"
                raise ValueError(f"{name}_scale {wanted}; {name} is {self.w13.dtype}")
            if scale is not None:
                experts, rows, columns = getattr(self, name).shape
                shape = (experts, fp8_blocks(rows), fp8_blocks(columns))
                check(f"{name}_scale", scale, shape=shape, dtype=torch.float32, device=device)
        if self.fp8 and self.intermediate % FP8_BLOCK:
            raise ValueError(
                f"w13 and w2 in FP8 must have an intermediate size that is a multiple of "
                f"{FP8_BLOCK}, got {self.intermediate}; shards that cut a {FP8_BLOCK}-block need EP"
            )
