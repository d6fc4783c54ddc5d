"""Norm of each head, rotation, and the write to the paged KV cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import USE_PDL, cdiv, next_power_of_2, pdl_launch_dependents, pdl_wait

COLUMNS = 1024  # of one program


@triton.jit
def qkv_prepare_kernel(
    qkv, cos, sin, q_weight, k_weight, q_out, k_cache, v_cache, write_slots, eps,
    qkv_stride, angle_stride, k_block_stride, k_token_stride, k_head_stride,
    v_block_stride, v_token_stride, v_head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has BH of a token's heads, by the two halves of their columns."""
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    column = tl.arange(0, BC)
    inside = (column < HALF)[None, :]
    here = (head < HEADS + 2 * KV_HEADS)[:, None] & inside
    place = qkv + token * qkv_stride + (head * 2 * HALF)[:, None] + column[None, :]
    first = tl.load(place, mask=here, other=0.0)
    second = tl.load(place + HALF, mask=here, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF) + eps)
        weight = tl.where(is_q[:, None], q_weight + column[None, :], k_weight + column[None, :])
        x_weight = tl.load(weight, mask=here, other=0.0).to(tl.float32)
        y_weight = tl.load(weight + HALF, mask=here, other=0.0).to(tl.float32)
        # Rounded between norm and rotation, as layers that store it in between do.
        x = (x * scale[:, None] * x_weight).to(first.dtype).to(tl.float32)
        y = (y * scale[:, None] * y_weight).to(first.dtype).to(tl.float32)
    angle = token * angle_stride + column[None, :]
    x_cos = tl.load(cos + angle, mask=inside, other=0.0)
    y_cos = tl.load(cos + angle + HALF, mask=inside, other=0.0)
    x_sin = tl.load(sin + angle, mask=inside, other=0.0)
    y_sin = tl.load(sin + angle + HALF, mask=inside, other=0.0)
    x_turned = (x * x_cos - y * x_sin).to(first.dtype)
    y_turned = (y * y_cos + x * y_sin).to(first.dtype)

    target = q_out + (token * HEADS + head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(target, x_turned, mask=is_q[:, None] & inside)
    tl.store(target + HALF, y_turned, mask=is_q[:, None] & inside)
    slot = tl.load(write_slots + token)
    if slot >= 0:
        block = (slot // BLOCK_SIZE).to(tl.int64)
        offset = slot % BLOCK_SIZE
        target = k_cache + block * k_block_stride + offset * k_token_stride
        target = target + ((head - HEADS) * k_head_stride)[:, None] + column[None, :]
        tl.store(target, x_turned, mask=is_k[:, None] & inside)
        tl.store(target + HALF, y_turned, mask=is_k[:, None] & inside)
        target = v_cache + block * v_block_stride + offset * v_token_stride
        target = target + ((head - HEADS - KV_HEADS) * v_head_stride)[:, None] + column[None, :]
        tl.store(target, first, mask=is_v[:, None] & inside)
        tl.store(target + HALF, second, mask=is_v[:, None] & inside)


def qkv_prepare(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    write_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """`kernels.qkv_prepare` in one launch."""
    tokens, width = qkv.shape
    kv_heads, d = k_cache.shape[2:]
    heads = width // d - 2 * kv_heads
    q = torch.empty(tokens, heads, d, dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return q
    half = next_power_of_2(d // 2)
    block_heads = min(max(1, COLUMNS // (2 * half)), next_power_of_2(heads + 2 * kv_heads))
    qkv_prepare_kernel[(tokens, cdiv(heads + 2 * kv_heads, block_heads))](
        qkv, cos, sin, qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight, q, k_cache, v_cache, write_slots, eps,
        qkv.stride(0), cos.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEADS=heads, KV_HEADS=kv_heads, HALF=d // 2, NORM=q_weight is not None,
        BLOCK_SIZE=k_cache.shape[1], BH=block_heads, BC=half, PDL=USE_PDL,
        num_warps=4, launch_pdl=USE_PDL,
    )  # fmt: skip
    return q
