"""The torch backend: the stages of the MoE runner on plain torch operations.

Rows are ordered by (expert, slot) without padding. For inference: no gradients are recorded.
"""

from __future__ import annotations

import numpy as np
import torch

from .checks import FLOAT_TYPES, INTEGER_TYPES, check, check_token_slot
from .expert_lora import add_down_, add_gate_up_
from .grouped_gemm import grouped_mm
from .host import on_host
from .host_align import RowBatch, align_on_host
from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables
from .moe_weights import MoeWeights
from .runner import MoeBackend


class TorchBackend(MoeBackend):
    """Any device and float type; what CPUs run on."""

    def align(
        self,
        topk_ids: torch.Tensor,
        lora_batch: LoraBatch | None,
        weights: MoeWeights,
        dtype: torch.dtype | None = None,
    ) -> RowBatch:
        check("topk_ids", topk_ids, shape=(None, None), dtype=INTEGER_TYPES)
        if lora_batch is not None:
            check_token_slot(lora_batch.token_slot, topk_ids.shape[0], topk_ids.device)
        return align_on_host(topk_ids, lora_batch, weights.num_experts)

    def gate_up(self, x: torch.Tensor, weights: MoeWeights, batch: RowBatch) -> torch.Tensor:
        weights.check(x)
        check("x", x, shape=(batch.num_tokens, None))
        h = grouped_mm(_rows(x, batch), weights.w13, batch.expert_first_row, weights.w13_scale)
        return _add_bias_(h, weights.w13_bias, batch)

    def lora_gate_up_(
        self, h: torch.Tensor, x: torch.Tensor, batch: RowBatch, tables: ExpertLoraTables
    ) -> None:
        check("x", x, shape=(batch.num_tokens, None), dtype=FLOAT_TYPES)
        check("h", h, shape=(_num_rows(batch), None), dtype=x.dtype, device=x.device)
        tables.check(batch.num_experts, x.device)
        add_gate_up_(h, _rows(x, batch), batch, tables)

    def activate(self, h: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        gate, up = h.chunk(2, dim=1)
        if weights.clamped is None:
            return torch.nn.functional.silu(gate).mul_(up)
        gate = gate.clamp(max=weights.clamped.limit)
        up = up.clamp(-weights.clamped.limit, weights.clamped.limit)
        return (up + 1) * gate * torch.sigmoid(weights.clamped.alpha * gate)

    def down(self, a: torch.Tensor, weights: MoeWeights, batch: RowBatch) -> torch.Tensor:
        check("a", a, shape=(_num_rows(batch), weights.intermediate), dtype=FLOAT_TYPES)
        y = grouped_mm(a, weights.w2, batch.expert_first_row, weights.w2_scale)
        return _add_bias_(y, weights.w2_bias, batch)

    def lora_down_(
        self, y: torch.Tensor, a: torch.Tensor, batch: RowBatch, tables: ExpertLoraTables
    ) -> None:
        check("a", a, shape=(_num_rows(batch), None), dtype=FLOAT_TYPES)
        check("y", y, shape=(_num_rows(batch), None), dtype=a.dtype, device=a.device)
        tables.check(batch.num_experts, a.device)
        add_down_(y, a, batch, tables)

    def combine(
        self,
        y: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        batch: RowBatch,
    ) -> torch.Tensor:
        """A token with no pair on this rank gets zeros."""
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


def _rows(x: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """Each row's token of x [T, H]."""
    return x.index_select(0, batch.row_token)


def _num_rows(batch: RowBatch) -> int:
    return batch.sorted_pairs.numel()


def _add_bias_(out: torch.Tensor, bias: torch.Tensor | None, batch: RowBatch) -> torch.Tensor:
    """Add each row's expert's bias [E, N] to out [rows, N]."""
    if bias is not None:
        count = torch.from_numpy(np.diff(on_host(batch.expert_first_row)))
        out += bias.to(out.dtype).repeat_interleave(count.to(out.device), 0)
    return out
