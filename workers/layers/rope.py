"""Rotary position embedding, of the types "default" and "yarn"."""

from __future__ import annotations

import math

import torch

from .rope_parameters import Yarn


def inverse_frequencies(
    rotary_dim: int, theta: float, yarn: Yarn | None = None
) -> tuple[torch.Tensor, float]:
    """Angles per position, float32 [rotary_dim / 2], and the factor on their cos and sin."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    wavelengths = theta**exponent
    if yarn is None:
        return 1.0 / wavelengths, 1.0

    def dimension(rotations: float) -> float:
        """The one, counted in pairs, whose frequency turns that often over the old context."""
        turns = math.log(yarn.original_positions / (rotations * 2 * math.pi))
        return rotary_dim * turns / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as transformers has it: a step, but no division by zero
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)
    interpolated = ramp.clamp(0, 1)  # 0: left as it was
    kept = 1 - interpolated
    frequencies = 1.0 / (yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, yarn.attention_scaling


class RotaryEmbedding:
    """Halves rotated (not interleaved)."""

    def __init__(
        self, frequencies: torch.Tensor, scaling: float, max_positions: int, device: torch.device
    ):
        """
        Args:
            frequencies, scaling: of `inverse_frequencies`.
            max_positions: positions from 0 that `at` is asked for.
        """
        angles = torch.outer(torch.arange(max_positions).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)  # [positions, D]
        self._cos = (angles.cos() * scaling).to(device)
        self._sin = (angles.sin() * scaling).to(device)

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
