"""What the paged kernels would misread is refused, before any kernel is loaded."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import PagedSequences, paged_attention, qkv_prepare, write_kv

BLOCKS, BLOCK_SIZE, KV_HEADS, D = 3, 4, 2, 8
TOKENS = 5


def cache(*, kv_heads=KV_HEADS, d=D, dtype=torch.float32):
    return torch.zeros(BLOCKS, BLOCK_SIZE, kv_heads, d, dtype=dtype)


def sequences():
    numbers = torch.zeros(8, dtype=torch.int32)
    return PagedSequences(
        query_start=numbers[:2], seq_lens=numbers[:1], block_start=numbers[:1], blocks=numbers[:2],
        write_slots=numbers[:TOKENS], decode=numbers[:0], prefill=numbers[:2].view(1, 2),
        max_context=0,
    )  # fmt: skip


def every_other(*shape):
    return torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


@pytest.mark.parametrize(
    ("q", "change", "message"),
    [
        (torch.zeros(4, 4, D), {}, r"q must have shape \[5, any, 8\], got \[4, 4, 8\]"),
        (torch.zeros(TOKENS, 4, D).half(), {}, "q must be torch.float32, got torch.float16"),
        (torch.zeros(TOKENS, 3, D), {}, "q must have a multiple of 2 heads"),
        (every_other(TOKENS, 4, D), {}, "q must have its columns side by side"),
        (torch.zeros(TOKENS, 4, D), {"window": 0}, "window must be 1 or more, got 0"),
        (torch.zeros(TOKENS, 4, D), {"sinks": torch.zeros(2)}, r"sinks must have shape \[4\]"),
    ],
)
def test_attention(q, change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(q, cache(), cache(), sequences(), scale=1.0, **change)


def test_caches():
    q = torch.zeros(TOKENS, 4, D)
    with pytest.raises(ValueError, match=r"v_cache must have shape \[3, 4, 2, any\]"):
        paged_attention(q, cache(), cache(kv_heads=1), sequences(), scale=1.0)
    columns_apart = every_other(BLOCKS, BLOCK_SIZE, KV_HEADS, D)
    with pytest.raises(ValueError, match="k_cache must have its columns side by side"):
        paged_attention(q, columns_apart, cache(), sequences(), scale=1.0)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (torch.zeros(TOKENS, 1, D), None, r"k must have shape \[5, 2, 8\]"),
        (torch.zeros(TOKENS, 2, D), torch.zeros(TOKENS, 2, 4), r"v must have shape \[5, 2, 8\]"),
        (every_other(TOKENS, 2, D), None, "k must have its columns side by side"),
    ],
)
def test_writes(k, v, message):
    with pytest.raises(ValueError, match=message):
        write_kv(k, v, cache(), cache(), torch.zeros(TOKENS, dtype=torch.int32))


@pytest.mark.parametrize(
    ("width", "change", "message"),
    [
        (KV_HEADS * 2 * D, {}, r"qkv must have \(heads \+ 2 \* 2\) \* 8 columns"),
        (6 * D + 1, {}, r"qkv must have \(heads \+ 2 \* 2\) \* 8 columns"),
        (6 * D, {"v_cache": cache(d=4)}, "and values of 4"),
        (6 * D, {"write_slots": torch.zeros(TOKENS)}, "write_slots must be torch.int32"),
        (6 * D, {"sin": torch.zeros(TOKENS, D // 2)}, r"sin must have shape \[5, 8\]"),
        (6 * D, {"sin": every_other(TOKENS, D)}, "cos and sin alike"),
        (6 * D, {"q_weight": torch.zeros(D)}, "both be given"),
    ],
)
def test_prepare(width, change, message):
    arguments = {
        "k_cache": cache(), "v_cache": cache(),
        "write_slots": torch.zeros(TOKENS, dtype=torch.int32),
        "cos": torch.zeros(TOKENS, D), "sin": torch.zeros(TOKENS, D),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        qkv_prepare(torch.zeros(TOKENS, width), **(arguments | change))
