"""LoRA on the experts' projections: which low-rank products a routed batch has."""

from __future__ import annotations

import numpy as np
import torch

from .host import on_host
from .host_align import RowBatch
from .lora_tables import FUSED_GATE_UP, ExpertLoraTables
from .low_rank import Expands, Shrinks, add_low_rank_


def add_gate_up_(
    h: torch.Tensor, rows: torch.Tensor, batch: RowBatch, tables: ExpertLoraTables
) -> None:
    """h [rows, 2I] += scale * B (A x) for gate (first I columns) and up; rows [rows, H]."""
    intermediate = h.shape[1] // 2
    found = _adapted_segments(batch, tables.offset_a13, tables.offset_b13)
    if found is None:
        return
    slot, index, first, end, a, b = found
    rank = on_host(tables.rank).reshape(-1, 3)[index]
    scale = on_host(tables.scale).reshape(-1, 3)[index]
    gate_rank, up_rank = rank[:, 0], rank[:, 1]
    fused = (on_host(tables.layout)[slot] & FUSED_GATE_UP) != 0
    # A's gate and up rows lie side by side, or are the same: either way one shrink.
    a_rank, up_column = gate_rank + up_rank, gate_rank
    if fused.any():
        a_rank = np.where(fused, np.maximum(gate_rank, up_rank), a_rank)
        up_column = np.where(fused, 0, gate_rank)
    zero = np.zeros(first.size, dtype=np.int32)
    shrinks = Shrinks(first, end, a, a_rank, zero)
    expands = Expands(
        first_row=np.concatenate((first, first)),
        end_row=np.concatenate((end, end)),
        offset=np.concatenate((b, b + gate_rank * np.int64(intermediate))),
        rank=np.concatenate((gate_rank, up_rank)),
        column=np.concatenate((zero, up_column)),
        scale=np.concatenate((scale[:, 0], scale[:, 1])),
        out_column=np.concatenate((zero, zero + intermediate)),
        out_size=np.concatenate((zero + intermediate, zero + intermediate)),
    )
    add_low_rank_(h, rows, tables.pool, _nonzero(shrinks), _nonzero(expands), a_transposed=False)


def add_down_(y: torch.Tensor, a: torch.Tensor, batch: RowBatch, tables: ExpertLoraTables) -> None:
    """y [rows, H] += scale * B (A a) for the down projection; a [rows, I]."""
    found = _adapted_segments(batch, tables.offset_a2, tables.offset_b2)
    if found is None:
        return
    _, index, first, end, offset_a, offset_b = found
    rank = on_host(tables.rank).reshape(-1, 3)[index, 2]
    scale = on_host(tables.scale).reshape(-1, 3)[index, 2]
    zero = np.zeros(first.size, dtype=np.int32)
    shrinks = Shrinks(first, end, offset_a, rank, zero)
    expands = Expands(first, end, offset_b, rank, zero, scale, zero, zero + y.shape[1])
    add_low_rank_(y, a, tables.pool, _nonzero(shrinks), _nonzero(expands), a_transposed=True)


def _adapted_segments(batch: RowBatch, offset_a: torch.Tensor, offset_b: torch.Tensor):
    """Slot, place in the tables, rows and offsets of the segments that have both factors."""
    segments = batch.segments
    if not segments.size:
        return None
    num_slots = offset_a.shape[0]
    if segments[:, 0].max() >= num_slots:
        raise ValueError(
            f"token_slot must be below the tables' {num_slots} slots, got {segments[:, 0].max()}"
        )
    index = segments[:, 0] * np.int64(batch.num_experts) + segments[:, 1]
    a = on_host(offset_a).reshape(-1)[index]
    b = on_host(offset_b).reshape(-1)[index]
    present = (a | b) >= 0  # -1 in either makes the sign bit
    if not present.all():
        if not present.any():
            return None
        segments, index, a, b = segments[present], index[present], a[present], b[present]
    return segments[:, 0], index, segments[:, 2], segments[:, 3], a, b


def _nonzero(products):
    """Without the products of rank 0, whose projection isn't adapted."""
    kept = products.rank > 0
    if kept.all():
        return products
    return type(products)(**{name: column[kept] for name, column in vars(products).items()})
