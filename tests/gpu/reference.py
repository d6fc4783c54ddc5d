"""The layer in float32, all pairs at once: for batches that would take `moe_reference` hours.

Every pair's factors are gathered from the pool: nothing here knows of blocks, runs or tiles.
`test_reference.py` holds it against the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loraplex.kernels import FUSED_GATE_UP, ExpertLoraTables

from ..kernels.cases import Layer

GATHER_ELEMENTS = 1 << 26  # of factors at a time: 256 MiB in float32


@dataclass(frozen=True)
class Pairs:
    """The (token, chosen expert) pairs that are on this rank."""

    pair: torch.Tensor  # int64 [n], token * top_k + k
    token: torch.Tensor  # int64 [n]
    expert: torch.Tensor  # int64 [n]
    slot: torch.Tensor  # int64 [n], -1 = base model
    weight: torch.Tensor  # float32 [n], routing weight


def pairs_of(layer: Layer) -> Pairs:
    ids = layer.topk_ids.reshape(-1).long()
    pair = (ids >= 0).nonzero().flatten()
    token = pair // layer.topk_ids.shape[1]
    weight = layer.topk_weights.reshape(-1)[pair].float()
    return Pairs(pair, token, ids[pair], layer.token_slot.long()[token], weight)


def gate_up_base(layer: Layer, pairs: Pairs) -> torch.Tensor:
    """[n, 2I]: x W13^T of each pair's expert."""
    return _by_expert(layer.x.float()[pairs.token], layer.w13, pairs.expert)


def gate_up_delta(layer: Layer, pairs: Pairs) -> torch.Tensor:
    """[n, 2I]: what each pair's adapter adds to it."""
    tables, x = layer.tables, layer.x.float()[pairs.token]
    intermediate, hidden = layer.w2.shape[2], x.shape[1]
    a, b, rank, scale = _entries(tables, tables.offset_a13, tables.offset_b13, pairs)
    fused = (tables.layout[pairs.slot.clamp(min=0)] & FUSED_GATE_UP) != 0
    gate, up = rank[:, 0], rank[:, 1]
    a_up = torch.where(fused, a, a + gate * hidden)
    b_up = b + gate * intermediate
    return torch.cat(
        (
            _low_rank(x, tables.pool, a, b, gate, scale[:, 0], intermediate, False),
            _low_rank(x, tables.pool, a_up, b_up, up, scale[:, 1], intermediate, False),
        ),
        1,
    )


def down_base(layer: Layer, pairs: Pairs, activated: torch.Tensor) -> torch.Tensor:
    """[n, H]: activated [n, I] times W2^T of each pair's expert."""
    return _by_expert(activated, layer.w2, pairs.expert)


def down_delta(layer: Layer, pairs: Pairs, activated: torch.Tensor) -> torch.Tensor:
    """[n, H]: what each pair's adapter adds to it."""
    tables = layer.tables
    a, b, rank, scale = _entries(tables, tables.offset_a2, tables.offset_b2, pairs)
    hidden = layer.x.shape[1]
    return _low_rank(activated, tables.pool, a, b, rank[:, 2], scale[:, 2], hidden, True)


def swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def combine(layer: Layer, pairs: Pairs, y: torch.Tensor) -> torch.Tensor:
    """[T, H]: each token's rows of y [n, H] summed by routing weight."""
    out = torch.zeros(layer.x.shape, device=y.device)
    return out.index_add_(0, pairs.token, y * pairs.weight[:, None])


def moe(layer: Layer, adapted: bool = True) -> torch.Tensor:
    """The whole layer, float32 [T, H]."""
    pairs = pairs_of(layer)
    h = gate_up_base(layer, pairs)
    if adapted:
        h += gate_up_delta(layer, pairs)
    activated = swiglu(h)
    y = down_base(layer, pairs, activated)
    if adapted:
        y += down_delta(layer, pairs, activated)
    return combine(layer, pairs, y)


def _by_expert(rows: torch.Tensor, weights: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    order = expert.argsort()
    counts = expert.bincount(minlength=weights.shape[0]).tolist()
    for number, mine in enumerate(order.split(counts)):
        if mine.numel():
            out[mine] = rows[mine] @ weights[number].float().T
    return out


def _entries(tables: ExpertLoraTables, offset_a, offset_b, pairs: Pairs):
    """Offsets [n], ranks [n, 3] and scales [n, 3] of each pair; rank 0 where it has no adapter."""
    slot, expert = pairs.slot.clamp(min=0), pairs.expert
    a, b = offset_a[slot, expert], offset_b[slot, expert]
    here = (pairs.slot >= 0) & (a >= 0) & (b >= 0)
    rank = torch.where(here[:, None], tables.rank[slot, expert].long(), 0)
    return a, b, rank, tables.scale[slot, expert]


def _low_rank(
    x: torch.Tensor,
    pool: torch.Tensor,
    offset_a: torch.Tensor,
    offset_b: torch.Tensor,
    rank: torch.Tensor,
    scale: torch.Tensor,
    out_size: int,
    a_transposed: bool,
) -> torch.Tensor:
    """scale * B (A x) of each row of x [n, in] with factors of its own: [n, out_size]."""
    out = x.new_zeros(x.shape[0], out_size)
    adapted = (rank > 0).nonzero().flatten()
    if adapted.numel() == 0:
        return out
    most = int(rank.max())
    for mine in adapted.split(max(1, GATHER_ELEMENTS // (most * max(x.shape[1], out_size)))):
        a = _blocks(pool, offset_a[mine], rank[mine], most, x.shape[1], a_transposed)
        b = _blocks(pool, offset_b[mine], rank[mine], most, out_size, True)
        s = torch.einsum("ni,nir->nr", x[mine], a)
        out[mine] = scale[mine, None] * torch.einsum("nr,nor->no", s, b)
    return out


def _blocks(
    pool: torch.Tensor,
    offset: torch.Tensor,
    rank: torch.Tensor,
    most: int,
    size: int,
    rank_last: bool,
) -> torch.Tensor:
    """float32 [n, size, most] of blocks [size, rank], or [rank, size] unless `rank_last`; zero
    beyond each block's rank."""
    i = torch.arange(size, device=pool.device)[None, :, None]
    r = torch.arange(most, device=pool.device)[None, None, :]
    ranks = rank[:, None, None]
    place = offset[:, None, None] + (i * ranks + r if rank_last else r * size + i)
    here = (r < ranks).expand(place.shape)
    return torch.where(here, pool[torch.where(here, place, 0)].float(), 0.0)
