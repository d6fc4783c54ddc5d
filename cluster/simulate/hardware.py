"""What things cost in the simulator: seconds of an engine step, seconds of a load."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step by its rows, decoded and prompt tokens together.

    Args:
        base: (rows, seconds) of the base model, rows ascending; linear between and beyond.
        lora: (rows, seconds) that one adapter adds.
        further_adapter_s: that each after the first adds.
    """

    base: tuple[tuple[int, float], ...]
    lora: tuple[tuple[int, float], ...]
    further_adapter_s: float = 0.0

    def seconds(self, rows: int, adapters: int) -> float:
        """
        Args:
            adapters: distinct ones in the step.
        """
        seconds = _interpolate(self.base, rows)
        if adapters:
            seconds += _interpolate(self.lora, rows) + self.further_adapter_s * (adapters - 1)
        return seconds


def _h100(layers: int) -> StepCosts:
    """From benchmarks/results/h100/engine.json: 12 layers, decode up to 64 rows, prefill at 8,192
    tokens a step; lm_head and sampling are `step` less `forward` there, and what each adapter
    after the first costs is that of its (32, 32) and (64, 32)."""
    base_us = ((1, 996.0), (8, 2656.0), (32, 4775.0), (64, 5408.0), (8192, 30626.0))
    lora_us = ((1, 125.0), (8, 187.0), (32, 355.0), (64, 355.0), (8192, 11230.0))
    head_us, further_us, times = 300.0, 20.0, layers / 12
    return StepCosts(
        tuple((rows, (us * times + head_us) * 1e-6) for rows, us in base_us),
        tuple((rows, us * times * 1e-6) for rows, us in lora_us),
        further_us * times * 1e-6,
    )


H100_48_LAYERS = _h100(48)


@dataclass(frozen=True)
class Hardware:
    """One group: an H100 with Qwen3-30B-A3B in bf16, unless told otherwise.

    Args:
        steps: seconds of engine steps.
        pool_bytes: adapters on the GPU.
        host_bytes, disk_bytes: packs in the node's memory and on its disk.
        kv_tokens: of running requests, prompts and outputs together.
        max_running, max_batch_tokens: as in `EngineConfig`.
        gpu_bytes_s: host to GPU (50 GB/s: what the load plan of whole layers is meant to reach).
        disk_bytes_s: disk to host; one NVMe drive.
        s3_bytes_s: object store to disk; 415 MB/s was measured on loopback.
        s3_latency_s: until an object's first byte.
        load_latency_s: of a load into the pool, whatever it loads.
        front_s: a request's time outside its group, until it is queued there.
        slowdown: how many times as long things take when 1, 2, ... groups that share a machine's
            cores compute at once; as the last one says beyond. (1.0,): nothing is shared.
        shared_node: all groups stand on one node, whose memory and disk they share.
    """

    steps: StepCosts = H100_48_LAYERS
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
    load_latency_s: float = 0.0
    front_s: float = 0.0
    slowdown: tuple[float, ...] = (1.0,)
    shared_node: bool = False

    def step_s(self, decode_rows: int, prompt_tokens: int, adapters: int) -> float:
        """Seconds of one engine step.

        Args:
            decode_rows: sequences that get their next token.
            prompt_tokens: of prompts, computed beside them.
            adapters: distinct ones in the step.
        """
        return self.steps.seconds(decode_rows + prompt_tokens, adapters)

    def slowed(self, busy: int) -> float:
        """How many times as long things take while so many groups compute, 1 at least."""
        return self.slowdown[min(max(busy, 1), len(self.slowdown)) - 1]


def _interpolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Linear between points, and beyond the last one as between the last two."""
    at = min(max(bisect_right(points, (x, float("inf"))), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (max(x, points[0][0]) - x0) / (x1 - x0)
