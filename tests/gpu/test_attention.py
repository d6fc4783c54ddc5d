"""The paged attention kernels at the sizes of real models, against float64 on the same inputs."""

from __future__ import annotations

import importlib

import pytest
import torch
from loraplex.workers.attention import DecodeBuffers, PagedBatch, plan_attention

from ..attention_cases import random_case
from ..kernels.poison import poisoned_memory
from .layers import DEVICE, NEEDS_GPU, assert_near
from .test_graph import capture

pytestmark = NEEDS_GPU

BLOCK_SIZE, BLOCKS = 16, 2400
# Relative Frobenius error. The softmax's weights are rounded once, to the dtype of the values.
ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# query heads, KV heads, D, DV, latent, window, sinks
SHAPES = {
    "Qwen3 MoE": (32, 4, 128, 128, False, None, False),
    "OLMoE": (16, 16, 128, 128, False, None, False),
    "gpt-oss, window": (64, 8, 64, 64, False, 128, True),
    "gpt-oss": (64, 8, 64, 64, False, None, True),
    "MLA, 16 heads": (16, 1, 576, 512, True, None, False),
    "MLA, 128 heads": (128, 1, 576, 512, True, None, False),
    "D 80": (8, 8, 80, 80, False, None, False),
    "D 96, 5 heads a group": (10, 2, 96, 96, False, 300, False),
    "D 192, DV 128": (4, 4, 192, 128, False, None, False),
    "D 256": (8, 2, 256, 256, False, None, False),
}
MIXED = [(0, 1), (1200, 1), (255, 1), (0, 130), (31, 1), (700, 77), (64, 16), (0, 300), (999, 2)]


def make_case(shape, lengths, **options):
    heads, kv_heads, d, dv, latent, window, sinks = SHAPES[shape]
    return random_case(
        lengths, heads, kv_heads, d, dv, latent=latent, window=window, sinks=sinks,
        block_size=BLOCK_SIZE, blocks=BLOCKS, unused=torch.nan, device=DEVICE, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixed_batch(shape, dtype):
    case = make_case(shape, MIXED, dtype=dtype)
    batch = plan_attention(case.steps, BLOCK_SIZE, DEVICE)
    assert isinstance(batch, PagedBatch)
    with poisoned_memory():
        assert_near(case.run(batch), case.expected, ERROR[dtype])


@pytest.mark.parametrize("shape", ["Qwen3 MoE", "gpt-oss, window", "MLA, 16 heads", "D 256"])
def test_a_mixed_batch_in_float32(shape):
    case = make_case(shape, MIXED, dtype=torch.float32)
    with poisoned_memory():
        got = case.run(plan_attention(case.steps, BLOCK_SIZE, DEVICE))
    assert_near(got, case.expected, ERROR[torch.float32])


@pytest.mark.parametrize("splits", [1, 2, 7, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_keys(shape, splits, monkeypatch):
    module = importlib.import_module("loraplex.kernels.gpu.paged_attention")
    monkeypatch.setattr(module, "decode_splits", lambda *_: splits)
    monkeypatch.setattr(module, "MIN_SHARE", 64)
    case = make_case(shape, [(n, 1) for n in (0, 4000, 63, 64, 1023)], dtype=torch.bfloat16)
    with poisoned_memory():
        got = case.run(plan_attention(case.steps, BLOCK_SIZE, DEVICE))
    assert_near(got, case.expected, ERROR[torch.bfloat16])


@pytest.mark.parametrize("shape", ["Qwen3 MoE", "gpt-oss", "gpt-oss, window", "MLA, 16 heads"])
@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_captured_step_serves_later_ones(shape, size):
    """Of other lengths and fewer sequences; the cache and the inputs stay at their addresses."""
    buffers = DecodeBuffers(64, 4096, BLOCK_SIZE, DEVICE)
    static = make_case(shape, [(n * 37 % 900, 1) for n in range(size)], dtype=torch.bfloat16)
    batch = buffers.batch(size, max_context=2048)
    buffers.fill([])  # capture runs on padding
    with poisoned_memory():
        graph, out = capture(lambda: static.run(batch))
    out.fill_(torch.nan)
    graph.replay()
    assert not out.any()
    for count in {size, max(1, size // 2), 1}:
        case = make_case(shape, [(n * 53 % 900, 1) for n in range(count)], dtype=torch.bfloat16)
        static.cache.k.copy_(case.cache.k)
        static.cache.v.copy_(case.cache.v)
        for mine, other in ((static.q, case.q), (static.k, case.k), (static.v, case.v)):
            if mine is not None:
                mine[:count] = other
        if case.sinks is not None:
            static.sinks.copy_(case.sinks)
        buffers.fill(case.steps)
        out.fill_(torch.nan)
        graph.replay()
        assert_near(out[:count], case.expected, ERROR[torch.bfloat16])
        assert not out[count:].any()
