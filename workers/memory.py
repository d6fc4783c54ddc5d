"""How a GPU's memory is shared out: weights and activations are measured, the rest is split."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import WorkerError

log = logging.getLogger(__name__)

_GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    kv_tokens: int
    pool_bytes: int


@dataclass(frozen=True)
class Usage:
    """Bytes of one device, before the KV cache and the adapter pool are made."""

    total: int
    used: int  # weights, tables, libraries, and what other processes hold
    activations: int  # most that the largest step takes beside them

    def left(self, fraction: float) -> int:
        return int(self.total * fraction) - self.used - self.activations


def measure(device: torch.device, largest_step: Callable[[], object], scratch: int) -> Usage:
    """Runs the largest step and measures.

    Args:
        largest_step: compiles its kernels on its first run; the second one is measured.
        scratch: bytes in use now that are given up afterwards.
    """
    largest_step()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    return Usage(total, total - free - scratch, peak)


def share_out(
    left: int,
    kv_token_bytes: int,
    block_size: int,
    kv_tokens: int | None,
    pool_bytes: int | None,
    adapter_fraction: float,
) -> Sizes:
    """Sizes of the KV cache and of the adapter pool; those that are given stay.

    Args:
        left: bytes for both, the same number on all ranks.
        kv_token_bytes: of one token's keys and values in all layers.
        adapter_fraction: the pool's share of `left` where neither is given.

    Raises:
        WorkerError: there is no room for what is given, or for what is to be derived.
    """
    if kv_tokens is not None and pool_bytes is not None:
        if kv_tokens * kv_token_bytes + pool_bytes > left:
            raise WorkerError(
                f"kv_tokens = {kv_tokens} take {kv_tokens * kv_token_bytes / _GIB:.2f} GiB and the "
                f"adapter pool {pool_bytes / _GIB:.2f} GiB, but weights and activations leave "
                f"{left / _GIB:.2f} GiB; lower kv_tokens, pool_bytes or max_batch_tokens, or raise "
                "tp_size"
            )
        return Sizes(kv_tokens, pool_bytes)
    if pool_bytes is None:
        for_kv = 0 if kv_tokens is None else kv_tokens * kv_token_bytes
        pool_bytes = int(left * adapter_fraction) if kv_tokens is None else left - for_kv
        if pool_bytes <= 0:
            raise WorkerError(_no_room("pool_bytes", left, for_kv))
    if kv_tokens is None:
        kv_tokens = (left - pool_bytes) // (kv_token_bytes * block_size) * block_size
        if kv_tokens <= 0:
            raise WorkerError(_no_room("kv_tokens", left, pool_bytes))
    return Sizes(kv_tokens, pool_bytes)


def _no_room(name: str, left: int, taken: int) -> str:
    return (
        f"{name} can't be derived: weights and activations leave {left / _GIB:.2f} GiB under "
        f"memory_fraction, of which {taken / _GIB:.2f} GiB are taken; raise memory_fraction or "
        "tp_size, or lower max_batch_tokens"
    )


def log_sizes(usage: Usage, sizes: Sizes, fraction: float, kv_token_bytes: int) -> None:
    log.info(
        "memory: %.0f %% of %.2f GiB: %.2f GiB weights and libraries, %.2f GiB activations, "
        "%.2f GiB KV cache of %d tokens, %.2f GiB adapter pool; graphs come out of the rest",
        100 * fraction, usage.total / _GIB, usage.used / _GIB, usage.activations / _GIB,
        sizes.kv_tokens * kv_token_bytes / _GIB, sizes.kv_tokens, sizes.pool_bytes / _GIB,
    )  # fmt: skip
