"""Rotary position embeddings, plain or stretched by YaRN."""

from __future__ import annotations

import torch

from .rope_scaling import Yarn


class RotaryEmbedding:
    """Rotary position embedding with halves rotated; `paired` brings other layouts to it."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_positions: int,
        device: torch.device,
        yarn: Yarn | None = None,
    ):
        """
        Args:
            head_dim: of the rotated part of a head.
        """
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponent
        scale = 1.0
        if yarn is not None:
            stretched = torch.tensor(yarn.stretched(head_dim, theta), dtype=torch.float32)
            frequencies = torch.lerp(frequencies, frequencies / yarn.factor, stretched)
            scale = yarn.cos_sin_scale
        angles = torch.outer(torch.arange(max_positions).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)  # [positions, D]
        self._cos = (angles.cos() * scale).to(device)
        self._sin = (angles.sin() * scale).to(device)

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

    @staticmethod
    def paired(x: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D] whose neighbours 2 i and 2 i + 1 are rotated together, as `apply` wants
        it: even ones, then odd ones. Queries and keys alike, so that their products stay."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
