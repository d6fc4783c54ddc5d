"""What stands between the q, k, v projection and attention over a paged KV cache, on a GPU."""

from __future__ import annotations

import torch

from .attention import check_cache
from .backends import gpu
from .checks import FLOAT_TYPES, check


def qkv_prepare(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    write_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Norms each head of q and k, rotates both, and writes k and v to the cache.

    Args:
        qkv: [T, (H + 2 KVH) * D], q, k and v side by side.
        k_cache, v_cache: [blocks, block_size, KVH, D].
        write_slots: int32 [T], block * block_size + offset of each token; -1: it is not written.
        cos, sin: float32 [T, D], the factors of each column; a head's halves are rotated into each
            other.
        q_weight, k_weight: [D] of the RMS norms in float32; None: no norm.
        eps: added to the mean squares.

    Returns:
        q, [T, H, D].

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or layout.
    """
    check_cache(k_cache, v_cache)
    tokens, width = qkv.shape
    kv_heads, d = k_cache.shape[2:]
    heads = width // d - 2 * kv_heads
    if heads < 1 or width % d or d % 2 or v_cache.shape[3] != d:
        raise ValueError(
            f"qkv must have (heads + 2 * {kv_heads}) * {d} columns with {d} even, for values of "
            f"{d} columns, got {width} columns, and values of {v_cache.shape[3]}"
        )
    check("qkv", qkv, shape=(None, None), dtype=k_cache.dtype, device=k_cache.device)
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv must have its columns side by side, got strides {qkv.stride()}")
    check("write_slots", write_slots, shape=(tokens,), dtype=torch.int32, device=qkv.device)
    for name, factor in (("cos", cos), ("sin", sin)):
        check(name, factor, shape=(tokens, d), dtype=torch.float32, device=qkv.device)
        if factor.stride() != cos.stride() or factor.stride(1) != 1:
            raise ValueError(f"{name} must have its columns side by side, cos and sin alike")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check(name, weight, shape=(d,), dtype=FLOAT_TYPES, device=qkv.device)
    return gpu().qkv_prepare(qkv, k_cache, v_cache, write_slots, cos, sin, q_weight, k_weight, eps)
