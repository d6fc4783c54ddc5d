"""What a config's rope parameters say, by transformers' definitions. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow frequencies are interpolated, fast ones left as they are.

    Attributes:
        factor: by which the slow frequencies are divided.
        original_positions: context that the model was first trained on, in tokens.
        beta_fast, beta_slow: rotations over that context from which a frequency is left alone, and
            up to which it is wholly interpolated.
        truncate: the ramp between the two begins and ends at whole dimensions.
        attention_scaling: on cos and sin both.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scaling: float = 1.0

    @classmethod
    def from_parameters(cls, rope: Mapping[str, Any], max_positions: int) -> Yarn:
        """Reads `rope_parameters` or `rope_scaling` of type "yarn".

        Args:
            max_positions: the config's max_position_embeddings.
        """
        original = rope.get("original_max_position_embeddings") or max_positions
        factor = rope.get("factor") or max_positions / original
        scaling = rope.get("attention_factor")
        if scaling is None:
            mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
            if mscale and all_dim:
                scaling = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
            else:
                scaling = yarn_mscale(factor)
        return cls(
            factor=float(factor),
            original_positions=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            truncate=rope.get("truncate", True),
            attention_scaling=float(scaling),
        )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """What attention is sharpened by after interpolation: 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
