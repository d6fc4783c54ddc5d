"""Paged attention against a slow, plainly right one, on fresh random inputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loraplex.workers.attention import PagedKVCache, plan_attention
from loraplex.workers.step import SequenceStep


def attend_slowly(q, keys, values, position, scale, window, sink):
    """One query [D] at `position` over its sequence's keys [S, D] and values [S, DV]."""
    first = 0 if window is None else max(0, position - window + 1)
    logits = (keys[first : position + 1].double() @ q.double()) * scale
    if sink is not None:
        logits = torch.cat([logits, sink.double()[None]])
    weights = torch.softmax(logits, dim=0)
    seen = values[first : position + 1].double()
    return weights[: len(seen)] @ seen


def random_sequences(block_size, lengths, blocks):
    """Sequences of (tokens before, new tokens), with their blocks scattered over the cache."""
    free = torch.randperm(blocks).tolist()
    steps = []
    for before, new in lengths:
        need = -(-(before + new) // block_size)
        steps.append(SequenceStep([0] * new, before, [free.pop() for _ in range(need)], -1))
    return steps


LENGTHS = [(0, 1), (37, 1), (5, 1), (16, 1), (0, 19), (9, 4), (33, 16), (0, 1)]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "d", "dv", "latent"),
    [
        (4, 4, 16, 16, False),
        (8, 2, 16, 16, False),
        (6, 1, 24, 16, False),
        (6, 1, 24, 16, True),
    ],
)
def test_paged_attention(query_heads, kv_heads, d, dv, latent, window, sinks):
    block_size, blocks = 8, 64
    cpu = torch.device("cpu")
    cache = PagedKVCache(2, blocks, block_size, kv_heads, d, torch.float32, cpu, dv, latent)
    steps = random_sequences(block_size, LENGTHS, blocks)
    group, scale = query_heads // kv_heads, 0.7 / math.sqrt(d)
    sink_logits = torch.randn(query_heads) * 2 if sinks else None
    whole = []
    for step in steps:
        length = step.start + len(step.token_ids)
        keys, values = torch.randn(length, kv_heads, d), torch.randn(length, kv_heads, dv)
        if latent:
            values = keys[..., :dv]
        whole.append((keys, values))
        for p in range(step.start):  # what earlier steps have left in the cache
            block, offset = step.blocks[p // block_size], p % block_size
            cache.k[1, block, offset] = keys[p]
            cache.v[1, block, offset] = values[p]
    new = [slice(s.start, s.start + len(s.token_ids)) for s in steps]
    k = torch.cat([kv[0][part] for kv, part in zip(whole, new, strict=True)])
    v = torch.cat([kv[1][part] for kv, part in zip(whole, new, strict=True)])
    q = torch.randn(len(k), query_heads, d)
    batch = plan_attention(steps, block_size, cpu)
    got = cache.attend(1, q, k, None if latent else v, batch, scale, window, sink_logits)
    assert got.shape == (len(k), query_heads * dv)
    row = 0
    for step, (keys, values) in zip(steps, whole, strict=True):
        for i, h in itertools.product(range(len(step.token_ids)), range(query_heads)):
            want = attend_slowly(
                q[row + i, h],
                keys[:, h // group],
                values[:, h // group],
                step.start + i,
                scale,
                window,
                None if sink_logits is None else sink_logits[h],
            )
            mine = got[row + i].view(query_heads, dv)[h]
            torch.testing.assert_close(mine.double(), want, atol=1e-5, rtol=1e-5)
        row += len(step.token_ids)
    assert not cache.k[0].any()
