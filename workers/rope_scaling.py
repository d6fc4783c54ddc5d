"""YaRN, which stretches rotary embeddings to longer texts (arXiv 2309.00071). No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Yarn:
    """What a config says of it, as `modeling_rope_utils` of transformers reads it.

    Frequencies that turn more than `beta_fast` times in the original context stay as they are,
    those that turn less than `beta_slow` times are divided by `factor`, with a ramp in between.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # DeepSeek's; 0: not given
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # of cos and sin; None: it follows from the others
    truncate: bool = True  # the ramp begins and ends at whole dimensions

    @classmethod
    def from_config(cls, rope: Mapping[str, Any], max_positions: int) -> Yarn:
        """Reads `rope_parameters` or `rope_scaling`.

        Args:
            max_positions: the config's max_position_embeddings.
        """
        original = rope.get("original_max_position_embeddings") or max_positions
        return cls(
            factor=rope.get("factor") or max_positions / original,
            original_positions=original,
            beta_fast=rope.get("beta_fast") or cls.beta_fast,
            beta_slow=rope.get("beta_slow") or cls.beta_slow,
            mscale=rope.get("mscale") or 0.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
            attention_factor=rope.get("attention_factor"),
            truncate=rope.get("truncate", True),
        )

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def latent_softmax_scale(self) -> float:
        """What multi-head latent attention multiplies its softmax scale by, for queries and keys
        alike: their parts that aren't rotated don't see `cos_sin_scale`."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def stretched(self, dim: int, theta: float) -> list[float]:
        """By frequency, dim / 2 of them: 0 where it stays as it is, 1 where it is divided by
        `factor`, something in between on the ramp."""
        low, high = (
            self._dimension(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # a step in place of the ramp
        return [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(dim // 2)]

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def _dimension(self, turns: float, dim: int, theta: float) -> float:
        """Index of the frequency that turns so often in the original context."""
        wavelength = self.original_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))
