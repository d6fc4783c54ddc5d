"""Layers that all model families share, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., N] normalised in float32, scaled by weight [N]."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


class RotaryEmbedding:
    """Rotary position embedding of the "default" type, halves rotated (not interleaved)."""

    def __init__(self, head_dim: int, theta: float, max_positions: int, device: torch.device):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(max_positions).float(), 1.0 / theta**exponent)
        angles = torch.cat([angles, angles], dim=-1)  # [positions, D]
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [T, 1, D], for positions int64 [T]."""
        return self._cos[positions][:, None], self._sin[positions][:, None]

    @staticmethod
    def apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D] rotated in float32."""
        half = x.shape[-1] // 2
        y = x.float()
        turned = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
        return (y * cos + turned * sin).to(x.dtype)


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax routing.

    Args:
        logits: [T, E]

    Returns:
        weights float32 [T, K] and expert ids int32 [T, K].
    """
    probs = torch.softmax(logits.float(), dim=-1)
    weights, ids = probs.topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(torch.int32)
