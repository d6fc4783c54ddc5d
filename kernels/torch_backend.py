"""The torch backend: the stages of the MoE runner on plain torch operations.

Rows are ordered by (expert, slot) without padding. Stages run in the order align, gate_up,
[lora_gate_up_], activate, down, [lora_down_], combine; the bracketed hooks are all that LoRA adds,
and are skipped where no token has an adapter. For inference: no gradients are recorded.
"""

from __future__ import annotations

import numpy as np
import torch

from .align import AlignedBatch
from .checks import FLOAT_TYPES, INTEGER_TYPES, check, check_token_slot
from .expert_lora import add_down_, add_gate_up_
from .grouped_gemm import grouped_mm
from .host import on_host
from .host_align import align_on_host
from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables


def align(topk_ids: torch.Tensor, lora_batch: LoraBatch | None, num_experts: int) -> AlignedBatch:
    """Rows of a layer: one for each pair that is on this rank, ordered (expert, slot, pair).

    Args:
        topk_ids: int32 or int64 [T, K], -1 = not on this rank.
        lora_batch: adapters of the step's tokens; None = no token has one.
        num_experts: experts on this rank.
    """
    check("topk_ids", topk_ids, shape=(None, None), dtype=INTEGER_TYPES)
    if lora_batch is not None:
        check_token_slot(lora_batch.token_slot, topk_ids.shape[0], topk_ids.device)
    return align_on_host(topk_ids, lora_batch, num_experts)


def gate_up(x: torch.Tensor, w13: torch.Tensor, batch: AlignedBatch) -> torch.Tensor:
    """x [T, H], w13 [E, 2I, H] (gate rows first) -> h [rows, 2I]."""
    _check_batch(batch)
    check("x", x, shape=(batch.num_tokens, None), dtype=FLOAT_TYPES)
    check("w13", w13, shape=(batch.num_experts, None, x.shape[1]), dtype=x.dtype, device=x.device)
    if w13.shape[1] % 2:
        raise ValueError(f"w13 must have gate and up rows (an even number), got {w13.shape[1]}")
    return grouped_mm(_rows(x, batch), w13, batch.expert_first_row)


def lora_gate_up_(
    h: torch.Tensor, x: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """Add the adapters' part to h [rows, 2I], in place; x [T, H] as given to gate_up."""
    _check_batch(batch)
    check("x", x, shape=(batch.num_tokens, None), dtype=FLOAT_TYPES)
    check("h", h, shape=(_num_rows(batch), None), dtype=x.dtype, device=x.device)
    _check_tables(tables, batch, x.device)
    add_gate_up_(h, _rows(x, batch), batch, tables)


def activate(h: torch.Tensor) -> torch.Tensor:
    """SwiGLU: h [rows, 2I] -> silu(gate) * up, [rows, I]."""
    gate, up = h.chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up)


def down(a: torch.Tensor, w2: torch.Tensor, batch: AlignedBatch) -> torch.Tensor:
    """a [rows, I], w2 [E, H, I] -> y [rows, H]."""
    _check_batch(batch)
    check("a", a, shape=(_num_rows(batch), None), dtype=FLOAT_TYPES)
    check("w2", w2, shape=(batch.num_experts, None, a.shape[1]), dtype=a.dtype, device=a.device)
    return grouped_mm(a, w2, batch.expert_first_row)


def lora_down_(
    y: torch.Tensor, a: torch.Tensor, batch: AlignedBatch, tables: ExpertLoraTables
) -> None:
    """Add the adapters' part to y [rows, H], in place; a [rows, I] as given to down."""
    _check_batch(batch)
    check("a", a, shape=(_num_rows(batch), None), dtype=FLOAT_TYPES)
    check("y", y, shape=(_num_rows(batch), None), dtype=a.dtype, device=a.device)
    _check_tables(tables, batch, a.device)
    add_down_(y, a, batch, tables)


def combine(y: torch.Tensor, topk_weights: torch.Tensor, batch: AlignedBatch) -> torch.Tensor:
    """Sum each token's rows by routing weight: y [rows, H], topk_weights [T, K] -> [T, H].

    A token with no pair on this rank gets zeros.
    """
    _check_batch(batch)
    num_tokens, top_k = batch.num_tokens, batch.top_k
    check("y", y, shape=(_num_rows(batch), None), dtype=FLOAT_TYPES)
    check("topk_weights", topk_weights, shape=(num_tokens, top_k), device=y.device)
    if y.shape[0] == 0:
        return y.new_zeros(num_tokens, y.shape[1])
    pairs = on_host(batch.sorted_pairs)
    row_of_pair = np.full(num_tokens * top_k, -1, dtype=np.int32)
    row_of_pair[pairs] = np.arange(pairs.size, dtype=np.int32)
    first = np.arange(0, num_tokens * top_k, top_k, dtype=np.int32)
    weights = topk_weights.reshape(-1).to(y.dtype)
    if pairs.size < num_tokens * top_k:
        here = row_of_pair >= 0
        row_of_pair = row_of_pair[here]
        weights = weights[torch.from_numpy(here).to(y.device)]
        first = (here.cumsum(dtype=np.int32) - here)[first]
    return torch.nn.functional.embedding_bag(
        torch.from_numpy(row_of_pair).to(y.device),
        y,
        torch.from_numpy(first).to(y.device),
        mode="sum",
        per_sample_weights=weights,
    )


def _rows(x: torch.Tensor, batch: AlignedBatch) -> torch.Tensor:
    """Each row's token of x [T, H]."""
    return x.index_select(0, batch.row_token)


def _num_rows(batch: AlignedBatch) -> int:
    return batch.sorted_pairs.numel()


def _check_batch(batch: AlignedBatch) -> None:
    if batch.block_size != 1:
        raise ValueError(
            "batch must come from this backend's align (block_size 1), "
            f"got block_size {batch.block_size}"
        )


def _check_tables(tables: ExpertLoraTables, batch: AlignedBatch, device: torch.device) -> None:
    check("tables.pool", tables.pool, shape=(None,), dtype=FLOAT_TYPES, device=device)
    shape = (None, batch.num_experts)
    check("tables.offset_a13", tables.offset_a13, shape=shape)
    check("tables.offset_b13", tables.offset_b13, shape=shape)
    check("tables.offset_a2", tables.offset_a2, shape=shape)
    check("tables.offset_b2", tables.offset_b2, shape=shape)
    check("tables.rank", tables.rank, shape=(*shape, 3))
    check("tables.scale", tables.scale, shape=(*shape, 3))
    check("tables.layout", tables.layout, shape=(None,))
