"""What each rank of a tensor- or expert-parallel layer holds."""

from __future__ import annotations

import dataclasses

import torch
from loraplex.kernels import gather_factors

from .cases import Layer

OFFSETS = ("offset_a13", "offset_b13", "offset_a2", "offset_b2")


def tp_share(layer: Layer, rank: int, size: int) -> Layer:
    """Rank's cut of I: rows of w13, B13 and A2, columns of w2; A13 and B2 whole. Its down bias is
    the first rank's alone."""
    experts, hidden, intermediate = layer.w2.shape
    part = intermediate // size
    mine = slice(rank * part, rank * part + part)
    pool: list[torch.Tensor] = []
    tables = dataclasses.replace(
        layer.tables,
        **{name: torch.full_like(layer.tables.offset_a13, -1) for name in OFFSETS},
        layout=torch.zeros_like(layer.tables.layout),
        rank=torch.zeros_like(layer.tables.rank),
    )

    def put(*blocks: torch.Tensor) -> int:
        offset = sum(block.numel() for block in pool)
        pool.extend(block.reshape(-1) for block in blocks)
        return offset

    for slot in range(tables.rank.shape[0]):
        for expert in range(experts):
            gate, up, down = gather_factors(layer.tables, slot, expert, hidden, intermediate)
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
    w13_bias = layer.w13_bias
    if w13_bias is not None:
        w13_bias = _gate_and_up(w13_bias, intermediate, mine)
    return dataclasses.replace(
        layer,
        w13=_gate_and_up(layer.w13, intermediate, mine),
        w2=layer.w2[:, :, mine].contiguous(),
        tables=tables,
        w13_bias=w13_bias,
        w2_bias=layer.w2_bias if rank == 0 else None,
    )


def _gate_and_up(rows: torch.Tensor, intermediate: int, mine: slice) -> torch.Tensor:
    return torch.cat((rows[:, mine], rows[:, intermediate:][:, mine]), 1)


def ep_share(layer: Layer, rank: int, size: int) -> Layer:
    """Rank's experts; ids of others are -1."""
    per_rank = layer.w13.shape[0] // size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    local = layer.topk_ids - rank * per_rank
    local[(local < 0) | (local >= per_rank)] = -1
    tables = dataclasses.replace(
        layer.tables,
        **{
            name: getattr(layer.tables, name)[:, mine].contiguous()
            for name in (*OFFSETS, "rank", "scale")
        },
    )
    return dataclasses.replace(
        layer,
        w13=layer.w13[mine],
        w2=layer.w2[mine],
        topk_ids=local,
        tables=tables,
        w13_bias=None if layer.w13_bias is None else layer.w13_bias[mine],
        w2_bias=None if layer.w2_bias is None else layer.w2_bias[mine],
    )
