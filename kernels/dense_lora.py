"""LoRA on dense projections (attention, shared experts), over runs of tokens with one adapter."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .backends import gpu
from .checks import check
from .host import on_host
from .lora_batch import HostSegments, LoraBatch
from .lora_tables import DenseLoraTables, check_max_rank
from .low_rank import Expands, Shrinks, add_low_rank_


def lora_linear_(
    out: torch.Tensor, x: torch.Tensor, tables: DenseLoraTables, lora_batch: LoraBatch
) -> None:
    """out += scale * B (A x) for each projection of `tables`, in place.

    Args:
        out: [T, sum(out_sizes)], the base outputs of the P projections side by side.
        x: [T, in], their common input; dtype and device of out.
        tables: factors of the P projections.
        lora_batch: adapter slot of each token, made once a step.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    _check_dense(x, tables, lora_batch)
    wanted = (x.shape[0], sum(tables.out_sizes))
    check("out", out, shape=wanted, dtype=x.dtype, device=x.device)
    if x.device.type != "cpu":
        gpu().lora_linear_(out, x, tables, lora_batch)
        return
    segments = lora_batch.host_segments
    num_slots = tables.rank.shape[0]
    if segments.slot.size and segments.slot.max() >= num_slots:
        raise ValueError(
            f"token_slot must be below the tables' {num_slots} slots, got {segments.slot.max()}"
        )
    products = _products(tables, segments)
    if products is None:
        return
    shrinks, expands = products
    if segments.order is None:
        add_low_rank_(out, x, tables.pool, shrinks, expands, tables.a_transposed)
        return
    order = torch.from_numpy(segments.order)
    rows = out[order]
    add_low_rank_(rows, x[order], tables.pool, shrinks, expands, tables.a_transposed)
    out[order] = rows


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tables: DenseLoraTables,
    lora_batch: LoraBatch | None,
) -> torch.Tensor:
    """x [T, in] W^T + bias, and each token's adapter on top: [T, sum(out_sizes)].

    Args:
        weight: [sum(out_sizes), in], of the projections under each other.
        lora_batch: None: no token has an adapter.
        For the others and for errors, see `lora_linear_`.
    """
    if lora_batch is None:
        return F.linear(x, weight, bias)
    if x.device.type != "cpu":
        _check_dense(x, tables, lora_batch)
        return gpu().lora_linear(x, weight, bias, tables, lora_batch)
    out = F.linear(x, weight, bias)
    lora_linear_(out, x, tables, lora_batch)
    return out


def _check_dense(x: torch.Tensor, tables: DenseLoraTables, lora_batch: LoraBatch) -> None:
    check("x", x, shape=(lora_batch.token_slot.shape[0], None))
    check("tables.pool", tables.pool, shape=(None,), device=x.device)
    check_max_rank(tables.max_rank)
    if tables.rank.shape[1] != len(tables.out_sizes):
        raise ValueError(
            f"tables.rank must have a column for each of the {len(tables.out_sizes)} out_sizes, "
            f"got shape {list(tables.rank.shape)}"
        )


def _products(tables: DenseLoraTables, segments: HostSegments) -> tuple[Shrinks, Expands] | None:
    slot = segments.slot
    offset_a, offset_b = on_host(tables.offset_a)[slot], on_host(tables.offset_b)[slot]
    rank = on_host(tables.rank)[slot]
    run, projection = np.nonzero((offset_a >= 0) & (offset_b >= 0) & (rank > 0))
    if run.size == 0:
        return None
    first, end = segments.first_row[run], segments.end_row[run]
    column = projection * int(rank.max())
    rank = rank[run, projection]
    size = np.array(tables.out_sizes)
    shrinks = Shrinks(first, end, offset_a[run, projection], rank, column)
    expands = Expands(
        first_row=first,
        end_row=end,
        offset=offset_b[run, projection],
        rank=rank,
        column=column,
        scale=on_host(tables.scale)[slot][run, projection],
        out_column=(np.cumsum(size) - size)[projection],
        out_size=size[projection],
    )
    return shrinks, expands
