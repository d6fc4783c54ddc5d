"""MXFP4 checkpoints: blocks of 32 four-bit floats (e2m1) with one power of two (e8m0) each.

The format is OCP's Microscaling Formats 1.0. Weights are brought into the engine's dtype when they
are loaded; bfloat16 and float32 hold them exactly.
"""

from __future__ import annotations

import logging

import torch

from ..config import ModelConfig
from ..shard import Shard

log = logging.getLogger(__name__)

BLOCK = 32  # elements that share a scale
# By code: one bit sign, two exponent, one mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = _E2M1 + tuple(-x for x in _E2M1)
# By code. Looked up rather than computed, so that every device has them exact.
_SCALES = (*(2.0 ** (code - 127) for code in range(255)), float("nan"))


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What MXFP4 codes mean.

    Args:
        blocks: uint8 [..., N, 16], two elements a byte, the first in the low bits.
        scales: uint8 [..., N].

    Returns:
        `dtype` [..., 32 N].
    """
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2).int()  # [..., N, 32]
    values, powers = (
        torch.tensor(table, dtype=torch.float32, device=blocks.device)
        for table in (_VALUES, _SCALES)
    )
    return (values[codes] * powers[scales.int()][..., None]).flatten(-2).to(dtype)


def dequantised_bytes(model: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Bytes that the experts' weights of all layers take on one rank in `dtype`."""
    per_expert = 3 * model.hidden_size * shard.intermediate
    return model.num_layers * len(shard.experts) * per_expert * dtype.itemsize


def say_what_it_takes(model: ModelConfig, shard: Shard, dtype: torch.dtype) -> None:
    """Logs it before anything is read: a checkpoint of 13 GB becomes one of 40."""
    size = dequantised_bytes(model, shard, dtype)
    log.warning(
        "rank %d of %d: the checkpoint's experts are MXFP4 and are dequantised to %s: "
        "they will take %d bytes (%.1f GiB) on this rank",
        shard.rank, shard.size, str(dtype).removeprefix("torch."), size, size / 2**30,
    )  # fmt: skip
