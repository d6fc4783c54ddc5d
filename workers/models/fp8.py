"""FP8 checkpoints, as DeepSeek-V3 and Qwen3-*-FP8 are published: a weight in e4m3, and beside it
`<weight>_scale_inv`, the scale of each block of 128 x 128 (which multiplies, whatever its name).

Routed experts, nearly all of such a model, stay as they are; the kernels read them. The other
projections are brought into the engine's dtype when they are loaded. What has no scale (embeddings,
norms, routers, `modules_to_not_convert`) is a plain weight.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from ...kernels import FP8, FP8_BLOCK, MoeWeights, dequantise_fp8, fp8_blocks
from ..config import ModelConfig
from ..errors import ModelUnsupported
from ..shard import Shard
from ..weights import TensorSource

log = logging.getLogger(__name__)

_SCALE = "_scale_inv"
_LEAST_CAPABILITY = (8, 9)  # of the GPUs that convert e4m3


class Fp8Source(TensorSource):
    """What a checkpoint holds, dequantised; with `dtype=FP8` the codes themselves."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.dtype, self.device = source.dtype, source.device
        self._lock = threading.Lock()
        self._fp8_bytes = self._dequantised_bytes = 0  # of what `get` gave

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def read(
        self,
        name: str,
        shape: Sequence[int],
        slices: tuple[slice, ...],
        into: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if dtype == FP8 or name.endswith(_SCALE) or name + _SCALE not in self._source:
            out = self._source.read(name, shape, slices, into, dtype)
            if dtype == FP8 or name.endswith(_SCALE):
                with self._lock:
                    self._fp8_bytes += out.nbytes
            return out
        codes = self._source.read(name, shape, slices, None, FP8)
        row, col = slices
        scale = self._source.get(
            name + _SCALE,
            [fp8_blocks(n) for n in shape],
            _blocks(row),
            _blocks(col),
            dtype=torch.float32,
        )
        values = dequantise_fp8(codes, scale, row.start, col.start)
        out = values.to(dtype) if into is None else into.copy_(values)
        with self._lock:
            self._dequantised_bytes += out.nbytes
        return out

    def say_what_it_takes(self, shard: Shard) -> None:
        log.warning(
            "rank %d of %d: the checkpoint is FP8: its experts stay so, in %d bytes (%.1f GiB) on "
            "this rank; its other projections are dequantised to %s, which takes %d bytes "
            "(%.1f GiB)",
            shard.rank, shard.size, self._fp8_bytes, self._fp8_bytes / 2**30,
            str(self.dtype).removeprefix("torch."),
            self._dequantised_bytes, self._dequantised_bytes / 2**30,
        )  # fmt: skip


def _blocks(part: slice) -> slice:
    """The blocks that these rows or columns meet."""
    return slice(part.start // FP8_BLOCK, fp8_blocks(part.stop))


def has_fp8_experts(checkpoint: TensorSource, prefix: str, gate: str, expert: int) -> bool:
    """Whether the experts `<prefix><number>` of a layer are quantised, by one of them."""
    return f"{prefix}{expert}.{gate}.weight{_SCALE}" in checkpoint


def load_fp8_experts(
    checkpoint: TensorSource,
    config: ModelConfig,
    shard: Shard,
    prefix: str,
    projections: tuple[str, str, str],
) -> MoeWeights:
    """This rank's experts, as codes and scales; `shard` doesn't cut a block."""
    mine, hidden, inter = shard.experts, config.hidden_size, config.moe_intermediate_size
    lo, hi = shard.intermediate_rows()
    part = slice(lo, hi)
    blocks = _blocks(part)
    count, tall, wide = blocks.stop - blocks.start, fp8_blocks(inter), fp8_blocks(hidden)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=checkpoint.device)

    w13 = empty(len(mine), 2, hi - lo, hidden, dtype=FP8)
    w2 = empty(len(mine), hidden, hi - lo, dtype=FP8)
    w13_scale = empty(len(mine), 2, count, wide, dtype=torch.float32)
    w2_scale = empty(len(mine), wide, count, dtype=torch.float32)
    gate, up, down = projections
    for n, e in enumerate(mine):
        for half, name in enumerate((gate, up)):
            weight = f"{prefix}{e}.{name}.weight"
            checkpoint.get(weight, (inter, hidden), part, into=w13[n, half], dtype=FP8)
            checkpoint.get(weight + _SCALE, (tall, wide), blocks, into=w13_scale[n, half])
        weight = f"{prefix}{e}.{down}.weight"
        checkpoint.get(weight, (hidden, inter), cols=part, into=w2[n], dtype=FP8)
        checkpoint.get(weight + _SCALE, (wide, tall), cols=blocks, into=w2_scale[n])
    return MoeWeights(w13.flatten(1, 2), w2, w13_scale=w13_scale.flatten(1, 2), w2_scale=w2_scale)


def check_device(device: torch.device) -> None:
    """
    Raises:
        ModelUnsupported: this GPU can't read FP8 weights.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY:
        return
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    least = ".".join(map(str, _LEAST_CAPABILITY))
    raise ModelUnsupported(
        f"FP8 weights need a GPU of compute capability {least} or higher, this one has {found}; "
        "give the checkpoint in bfloat16"
    )
