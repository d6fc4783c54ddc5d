"""TP and EP on the Triton backends: the ranks' outputs sum to the whole layer."""

import pytest
import torch

from ..cases import assert_close, random_layer
from ..shares import ep_share, tp_share
from .layers import BACKENDS, interpreted, run, tiles

pytestmark = interpreted


@pytest.mark.parametrize(
    ("backend", "gpt_oss"), [("fused", False), ("fused", True), ("hooked", True)]
)
def test_tp_ranks_sum_to_the_unsharded_layer(backend, gpt_oss):
    layer = random_layer(1, 12, gpt_oss=gpt_oss)
    kernels = BACKENDS[backend](tiles())
    parts = [run(tp_share(layer, rank, 2), kernels) for rank in range(2)]
    assert_close(torch.stack(parts).sum(0), layer.expected())


@pytest.mark.parametrize(("backend", "size"), [("fused", 2), ("fused", 3), ("hooked", 2)])
def test_ep_ranks_skip_others_experts_and_sum_to_the_whole(backend, size):
    layer = random_layer(2, 12)
    kernels = BACKENDS[backend](tiles())
    parts = [run(ep_share(layer, rank, size), kernels) for rank in range(size)]
    assert_close(torch.stack(parts).sum(0), layer.expected())


def test_experts_split_over_ranks_that_split_each_experts_intermediate():
    layer = random_layer(3, 12)
    kernels = BACKENDS["fused"](tiles())
    parts = [
        run(tp_share(ep_share(layer, expert_rank, 2), rank, 2), kernels)
        for expert_rank in range(2)
        for rank in range(2)
    ]
    assert_close(torch.stack(parts).sum(0), layer.expected())
