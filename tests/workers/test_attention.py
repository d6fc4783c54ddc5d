"""Paged attention on CPUs against a slow, plainly right one, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from loraplex.workers.attention import plan_attention

from ..attention_cases import LENGTHS, random_case


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
    case = random_case(
        LENGTHS, query_heads, kv_heads, d, dv, latent=latent, window=window, sinks=sinks
    )
    got = case.run(plan_attention(case.steps, 8, torch.device("cpu")))
    assert got.shape == case.expected.shape
    torch.testing.assert_close(got.double(), case.expected, atol=1e-5, rtol=1e-5)
    assert not case.cache.k[0].any()
