"""Norms, rotation and cache write in one launch each, at the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import add_rms_norm_, qkv_prepare
from loraplex.workers.layers.blocks import HeadNorm
from loraplex.workers.layers.rope import RotaryEmbedding, inverse_frequencies

from ..kernels.poison import poisoned_memory
from .layers import DEVICE, NEEDS_GPU, assert_near

pytestmark = NEEDS_GPU

BLOCK_SIZE, BLOCKS, EPS = 16, 64, 1e-6
ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6}


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 4, 128), (64, 8, 64), (10, 2, 96)])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_qkv_prepare(tokens, heads, kv_heads, d, normed, dtype):
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, device=DEVICE).to(dtype)
    rope = RotaryEmbedding(*inverse_frequencies(d, 1e6), 4096, DEVICE)
    cos, sin = rope.at(torch.randint(0, 4096, (tokens,), device=DEVICE))
    weights = [torch.randn(d, device=DEVICE).to(dtype) for _ in range(2)] if normed else [None] * 2
    k_cache, v_cache = torch.full(
        (2, BLOCKS, BLOCK_SIZE, kv_heads, d), torch.nan, dtype=dtype, device=DEVICE
    )
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, device=DEVICE)[:tokens].int()
    if tokens > 1:
        slots[tokens // 2] = -1  # padding
    with poisoned_memory():
        got = qkv_prepare(qkv, k_cache, v_cache, slots, cos[:, 0], sin[:, 0], *weights, EPS)
    sizes = (heads * d, kv_heads * d, kv_heads * d)
    q, k, v = qkv.float().split(sizes, dim=-1)
    if normed:
        q, k = HeadNorm(weights[0].float(), weights[1].float(), EPS)(q, k)
    q, k = (RotaryEmbedding.apply(x.reshape(tokens, -1, d), cos, sin) for x in (q, k))
    assert_near(got, q, ERROR[dtype])
    there = slots >= 0
    at = slots[there].long()
    if len(at):
        assert_near(k_cache.flatten(0, 1)[at], k[there], ERROR[dtype])
        assert torch.equal(v_cache.flatten(0, 1)[at], v[there].view(-1, kv_heads, d).to(dtype))
    for cache in (k_cache, v_cache):
        assert int((~cache.isnan()).any(-1).any(-1).sum()) == len(at)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("n", [64, 2048, 2880, 7168])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_add_rms_norm(tokens, n, dtype):
    x, y = (torch.randn(tokens, n, device=DEVICE).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(n, device=DEVICE).to(dtype)
    for added in (y, None):
        total = x + y if added is not None else x.clone()
        mine = x.clone()
        with poisoned_memory():
            got = add_rms_norm_(mine, added, weight, EPS)
        wanted = total.double()
        wanted = wanted / (wanted.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        assert torch.equal(mine, total)
        assert_near(got, wanted, ERROR[dtype])
