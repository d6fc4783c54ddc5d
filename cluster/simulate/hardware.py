"""What things cost in the simulator: seconds of an engine step, seconds of a load."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# Rows in a step -> microseconds of 12 layers on an H100 (base model; what one adapter adds), from
# benchmarks/results/h100/engine.json: decode up to 64 rows, prefill at 8,192 tokens a step.
_BASE_US = ((1, 996.0), (8, 2656.0), (32, 4775.0), (64, 5408.0), (8192, 30626.0))
_LORA_US = ((1, 125.0), (8, 187.0), (32, 355.0), (64, 355.0), (8192, 11230.0))
_MEASURED_LAYERS = 12
_FURTHER_ADAPTER_US = 20.0  # each after the first, in 12 layers: (32, 32) and (64, 32) there
_HEAD_US = 300.0  # lm_head and sampling: `step` less `forward`


@dataclass(frozen=True)
class Hardware:
    """One group: an H100 with Qwen3-30B-A3B in bf16, unless told otherwise.

    Args:
        layers: of the model; step times grow with them.
        pool_bytes: adapters on the GPU.
        host_bytes, disk_bytes: packs in the node's memory and on its disk.
        kv_tokens: of running requests, prompts and outputs together.
        max_running, max_batch_tokens: as in `EngineConfig`.
        gpu_bytes_s: host to GPU (50 GB/s: what the load plan of whole layers is meant to reach).
        disk_bytes_s: disk to host; one NVMe drive.
        s3_bytes_s: object store to disk; 415 MB/s was measured on loopback.
        s3_latency_s: until an object's first byte.
    """

    layers: int = 48
    pool_bytes: int = 4 * 1_694_498_816  # four adapters of rank 16, benchmarks/results/*/pool.json
    host_bytes: int = 64 << 30
    disk_bytes: int = 1 << 40
    kv_tokens: int = 200_000
    max_running: int = 64
    max_batch_tokens: int = 2048
    gpu_bytes_s: float = 50e9
    disk_bytes_s: float = 2e9
    s3_bytes_s: float = 415e6
    s3_latency_s: float = 0.05

    def step_s(self, decode_rows: int, prompt_tokens: int, adapters: int) -> float:
        """Seconds of one engine step.

        Args:
            decode_rows: sequences that get their next token.
            prompt_tokens: of prompts, computed beside them.
            adapters: distinct ones in the step.
        """
        rows = decode_rows + prompt_tokens
        us = _interpolate(_BASE_US, rows)
        if adapters:
            us += _interpolate(_LORA_US, rows) + _FURTHER_ADAPTER_US * (adapters - 1)
        return (us * self.layers / _MEASURED_LAYERS + _HEAD_US) * 1e-6


def _interpolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Linear between points, and beyond the last one as between the last two."""
    at = min(max(bisect_right(points, (x, float("inf"))), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (max(x, points[0][0]) - x0) / (x1 - x0)
