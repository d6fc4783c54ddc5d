"""LoRA on the experts' projections: which low-rank terms a routed batch has."""

from __future__ import annotations

import torch

from .align import AlignedBatch
from .lora_tables import FUSED_GATE_UP, ExpertLoraTables
from .low_rank import LowRankTerms, add_low_rank_


def add_gate_up_(
    h: torch.Tensor, rows: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """h [rows, 2I] += scale * B (A x) for gate (first I columns) and up; rows [rows, H]."""
    hidden, intermediate = rows.shape[1], h.shape[1] // 2
    slot, expert, first, end = batch.segments.long().unbind(1)
    a = tables.offset_a13[slot, expert]
    b = tables.offset_b13[slot, expert]
    rank = tables.rank[slot, expert, :2].long()
    scale = tables.scale[slot, expert, :2]
    gate_rank, up_rank = rank.unbind(1)
    fused = (tables.layout[slot] & FUSED_GATE_UP) != 0
    up_a = a + torch.where(fused, 0, gate_rank * hidden)
    up_b = b + gate_rank * intermediate
    missing = (a < 0) | (b < 0)
    rank = rank.masked_fill(missing.unsqueeze(1), 0).T.reshape(-1)
    column = torch.full_like(first, intermediate)
    terms = _present(
        rank,
        first_row=first.repeat(2),
        end_row=end.repeat(2),
        offset_a=torch.cat((a, up_a)),
        offset_b=torch.cat((b, up_b)),
        scale=scale.T.reshape(-1),
        out_first=torch.cat((torch.zeros_like(column), column)),
        out_size=column.repeat(2),
    )
    if terms is not None:
        add_low_rank_(h, rows, tables.pool, terms, a_transposed=False)


def add_down_(
    y: torch.Tensor, a: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """y [rows, H] += scale * B (A a) for the down projection; a [rows, I]."""
    slot, expert, first, end = batch.segments.long().unbind(1)
    offset_a = tables.offset_a2[slot, expert]
    offset_b = tables.offset_b2[slot, expert]
    rank = tables.rank[slot, expert, 2].long()
    terms = _present(
        rank.masked_fill((offset_a < 0) | (offset_b < 0), 0),
        first_row=first,
        end_row=end,
        offset_a=offset_a,
        offset_b=offset_b,
        scale=tables.scale[slot, expert, 2],
        out_first=torch.zeros_like(first),
        out_size=torch.full_like(first, y.shape[1]),
    )
    if terms is not None:
        add_low_rank_(y, a, tables.pool, terms, a_transposed=True)


def _present(rank: torch.Tensor, **columns: torch.Tensor) -> LowRankTerms | None:
    """The terms with a positive rank, or None if there is none."""
    kept = (rank > 0).nonzero().squeeze(1)
    if kept.numel() == 0:
        return None
    if kept.numel() == rank.numel():
        return LowRankTerms(rank=rank, **columns)
    return LowRankTerms(rank=rank[kept], **{name: c[kept] for name, c in columns.items()})
