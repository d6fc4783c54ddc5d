"""One launch for norm, rotation and cache write, against the layers that do them one by one."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels.gpu import qkv_prepare
from loraplex.workers.layers.blocks import HeadNorm
from loraplex.workers.layers.rope import RotaryEmbedding, inverse_frequencies

from ..poison import poisoned_memory
from .layers import TOLERANCE, interpreted, laid_out

pytestmark = interpreted

BLOCK_SIZE, EPS = 8, 1e-3


def split_up(qkv, heads, kv_heads, d, cos, sin, norm):
    """q, k and v [T, heads, D] by the torch layers."""
    q, k, v = qkv.split((heads * d, kv_heads * d, kv_heads * d), dim=-1)
    if norm is not None:
        q, k = norm(q, k)
    q, k = (RotaryEmbedding.apply(x.reshape(len(qkv), -1, d), cos, sin) for x in (q, k))
    return q, k, v.reshape(len(qkv), -1, d)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "d"),
    [(2, 4, 2, 16), (9, 6, 1, 24), (5, 3, 3, 8), (3, 40, 8, 64)],
)
def test_as_the_layers_do(tokens, heads, kv_heads, d, normed, dtype):
    qkv = laid_out(torch.randn(tokens, (heads + 2 * kv_heads) * d).to(dtype), "part of wider rows")
    rope = RotaryEmbedding(*inverse_frequencies(d, 100.0), 50, torch.device("cpu"))
    cos, sin = rope.at(torch.randint(0, 50, (tokens,)))
    norm = HeadNorm(torch.randn(d).to(dtype), torch.randn(d).to(dtype), EPS) if normed else None
    k_cache, v_cache = torch.full((2, 4, BLOCK_SIZE, kv_heads, d), torch.nan, dtype=dtype)
    slots = torch.randperm(4 * BLOCK_SIZE)[:tokens].int()
    slots[tokens // 2] = -1  # padding
    with poisoned_memory():
        got = qkv_prepare(
            qkv, k_cache, v_cache, slots, cos[:, 0], sin[:, 0],
            norm and norm.q_weight, norm and norm.k_weight, EPS,
        )  # fmt: skip
    q, k, v = split_up(qkv, heads, kv_heads, d, cos, sin, norm)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(got, q, **near)
    expected = torch.full((2, 4 * BLOCK_SIZE, kv_heads, d), torch.nan, dtype=dtype)
    there = slots >= 0
    expected[:, slots[there].long()] = torch.stack([k[there], v[there]])
    caches = torch.stack([k_cache, v_cache]).flatten(1, 2)
    torch.testing.assert_close(caches, expected, equal_nan=True, **near)
