"""TP and EP: each rank's tables hold a share, and the ranks' outputs sum to the whole layer."""

import dataclasses

import pytest
import torch
from loraplex.kernels import ExpertLoraTables, fused_moe, gather_factors, moe_reference

from .cases import PRODUCTS, Layer, assert_close, products_by, random_layer

HIDDEN, INTERMEDIATE, EXPERTS = 40, 24, 6


def tp_share(layer: Layer, rank: int, size: int) -> Layer:
    """Rank's cut of I: B13's rows and A2's rows; A13 and B2 whole."""
    part = INTERMEDIATE // size
    mine = slice(rank * part, rank * part + part)
    pool: list[torch.Tensor] = []
    tables = dataclasses.replace(
        layer.tables,
        **{
            name: torch.full_like(layer.tables.offset_a13, -1)
            for name in ("offset_a13", "offset_b13", "offset_a2", "offset_b2")
        },
        layout=torch.zeros_like(layer.tables.layout),
        rank=torch.zeros_like(layer.tables.rank),
    )

    def put(*blocks: torch.Tensor) -> int:
        offset = sum(block.numel() for block in pool)
        pool.extend(block.reshape(-1) for block in blocks)
        return offset

    for slot in range(tables.rank.shape[0]):
        for expert in range(EXPERTS):
            gate, up, down = gather_factors(layer.tables, slot, expert, HIDDEN, INTERMEDIATE)
            place = (slot, expert)
            pair = [factor for factor in (gate, up) if factor is not None]
            if pair:
                tables.offset_a13[place] = put(*(factor.a for factor in pair))
                tables.offset_b13[place] = put(*(factor.b[mine] for factor in pair))
            if down is not None:
                tables.offset_a2[place] = put(down.a.T[mine])
                tables.offset_b2[place] = put(down.b)
            for i, factor in enumerate((gate, up, down)):
                if factor is not None:
                    tables.rank[slot, expert, i] = factor.a.shape[0]
    tables.pool = torch.cat([*pool, torch.zeros(1)])
    gate_rows, up_rows = layer.w13[:, mine], layer.w13[:, INTERMEDIATE:][:, mine]
    return dataclasses.replace(
        layer, w13=torch.cat((gate_rows, up_rows), 1), w2=layer.w2[:, :, mine], tables=tables
    )


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("size", [2, 4])
def test_tp_ranks_sum_to_the_unsharded_layer(way, size):
    layer = random_layer(size, 30)
    total = torch.zeros(30, HIDDEN)
    with products_by(way):
        for rank in range(size):
            share = tp_share(layer, rank, size)
            total += fused_moe(*share.args(), share.tables, share.token_slot)
    assert_close(total, moe_reference(*layer.args(), layer.tables, layer.token_slot))


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("size", [2, 3])
def test_ep_ranks_skip_others_experts_and_sum_to_the_whole(way, size):
    layer = random_layer(10 + size, 30)
    per_rank = EXPERTS // size
    total = torch.zeros(30, HIDDEN)
    for rank in range(size):
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        local = layer.topk_ids - rank * per_rank
        local[(local < 0) | (local >= per_rank)] = -1
        tables = ExpertLoraTables(
            pool=layer.tables.pool,
            layout=layer.tables.layout,
            **{
                name: getattr(layer.tables, name)[:, mine].contiguous()
                for name in (
                    "offset_a13", "offset_b13", "offset_a2", "offset_b2", "rank", "scale",
                )
            },
        )  # fmt: skip
        with products_by(way):
            total += fused_moe(
                layer.x, layer.w13[mine], layer.w2[mine], layer.topk_weights, local, tables,
                layer.token_slot,
            )  # fmt: skip
    assert_close(total, moe_reference(*layer.args(), layer.tables, layer.token_slot))
