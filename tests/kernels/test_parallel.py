"""TP and EP: each rank's tables hold a share, and the ranks' outputs sum to the whole layer."""

import pytest
import torch
from loraplex.kernels import fused_moe

from .cases import PRODUCTS, Layer, assert_close, products_by, random_layer
from .shares import ep_share, tp_share


def run(share: Layer) -> torch.Tensor:
    return fused_moe(*share.args(), share.tables, share.token_slot, **share.options())


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("gpt_oss", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tp_ranks_sum_to_the_unsharded_layer(way, size, gpt_oss):
    layer = random_layer(size, 30, gpt_oss=gpt_oss)
    with products_by(way):
        parts = [run(tp_share(layer, rank, size)) for rank in range(size)]
    assert_close(torch.stack(parts).sum(0), layer.expected())


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("size", [2, 3])
def test_ep_ranks_skip_others_experts_and_sum_to_the_whole(way, size):
    layer = random_layer(10 + size, 30)
    with products_by(way):
        parts = [run(ep_share(layer, rank, size)) for rank in range(size)]
    assert_close(torch.stack(parts).sum(0), layer.expected())


@pytest.mark.parametrize("way", PRODUCTS)
def test_experts_split_over_ranks_that_split_each_experts_intermediate(way):
    layer = random_layer(20, 30)
    with products_by(way):
        parts = [
            run(tp_share(ep_share(layer, expert_rank, 2), rank, 3))
            for expert_rank in range(2)
            for rank in range(3)
        ]
    assert_close(torch.stack(parts).sum(0), layer.expected())
