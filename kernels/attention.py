"""Attention over a paged KV cache on a GPU. There is no backend for CPUs here: workers have one
that pads in torch."""

from __future__ import annotations

import torch

from .backends import gpu
from .checks import FLOAT_TYPES, check
from .paged_sequences import PagedSequences


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sequences: PagedSequences,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    latent: bool = False,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens to all its tokens in the cache.

    Args:
        q: [T, H, D], heads and columns in any layout with columns side by side.
        k_cache: [blocks, block_size, KVH, D], which the new keys have been written to.
        v_cache: [blocks, block_size, KVH, DV].
        scale: of q k^T.
        window: a token sees itself and the window - 1 before it; None: all before it.
        sinks: [H], logits that take part in the softmax of each head and add nothing.
        latent: v_cache is the first DV columns of k_cache.

    Returns:
        [T, H * DV]

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
    """
    check_cache(k_cache, v_cache)
    kv_heads, d = k_cache.shape[2:]
    tokens = sequences.write_slots.shape[0]
    check("q", q, shape=(tokens, None, d), dtype=k_cache.dtype, device=k_cache.device)
    heads = q.shape[1]
    if heads % kv_heads:
        raise ValueError(f"q must have a multiple of {kv_heads} heads, the cache's, got {heads}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, got {window}")
    if sinks is not None:
        check("sinks", sinks, shape=(heads,), dtype=FLOAT_TYPES, device=q.device)
    if q.stride(2) != 1:
        raise ValueError(f"q must have its columns side by side, got strides {list(q.stride())}")
    return gpu().paged_attention(q, k_cache, v_cache, sequences, scale, window, sinks, latent)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    write_slots: torch.Tensor,
) -> None:
    """Copies new keys and values to their slots; those of slot -1 go nowhere.

    Args:
        k: [T, KVH, D], columns side by side.
        v: [T, KVH, DV] likewise; None where v_cache is a part of k_cache.
        k_cache: [blocks, block_size, KVH, D]; v_cache: [blocks, block_size, KVH, DV].
        write_slots: int32 [T].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
    """
    check_cache(k_cache, v_cache)
    tokens = write_slots.shape[0]
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is None:
            continue
        shape = (tokens, *cache.shape[2:])
        check(name, new, shape=shape, dtype=cache.dtype, device=cache.device)
        if new.stride(2) != 1:
            raise ValueError(
                f"{name} must have its columns side by side, got strides {list(new.stride())}"
            )
    gpu().write_kv(k, v, k_cache, v_cache, write_slots)


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError unless both are caches of one layer that kernels read right."""
    check("k_cache", k_cache, shape=(None, None, None, None), dtype=FLOAT_TYPES)
    check(
        "v_cache", v_cache, shape=(*k_cache.shape[:3], None), dtype=k_cache.dtype,
        device=k_cache.device,
    )  # fmt: skip
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            raise ValueError(
                f"{name} must have its columns side by side, got strides {list(cache.stride())}"
            )
