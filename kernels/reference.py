"""What each op means: float32 torch, loops and all. Every backend is tested against this file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_fp8 import dequantise_fp8
from .lora_tables import FUSED_GATE_UP, DenseLoraTables, ExpertLoraTables
from .moe_weights import ClampedSwiglu


@dataclass(frozen=True)
class Factors:
    """One projection's LoRA factors: y += scale * B (A x)."""

    a: torch.Tensor  # float32 [rank, in]
    b: torch.Tensor  # float32 [out, rank]
    scale: float

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds for `x` [..., in], as [..., out]."""
        return self.scale * (x @ self.a.T @ self.b.T)


def gather_factors(
    tables: ExpertLoraTables, slot: int, expert: int, hidden: int, intermediate: int
) -> tuple[Factors | None, Factors | None, Factors | None]:
    """Gate, up and down factors of one (slot, expert); None where that projection isn't adapted."""
    rank_gate, rank_up, rank_down = tables.rank[slot, expert].tolist()
    scale_gate, scale_up, scale_down = tables.scale[slot, expert].tolist()
    fused = bool(int(tables.layout[slot]) & FUSED_GATE_UP)
    gate = up = down = None
    a13, b13 = int(tables.offset_a13[slot, expert]), int(tables.offset_b13[slot, expert])
    if a13 >= 0 and b13 >= 0:
        b_up = b13 + intermediate * rank_gate
        if rank_gate:
            a = _block(tables.pool, a13, rank_gate, hidden)
            gate = Factors(a, _block(tables.pool, b13, intermediate, rank_gate), scale_gate)
        if rank_up:
            a = _block(tables.pool, a13 if fused else a13 + rank_gate * hidden, rank_up, hidden)
            up = Factors(a, _block(tables.pool, b_up, intermediate, rank_up), scale_up)
    a2, b2 = int(tables.offset_a2[slot, expert]), int(tables.offset_b2[slot, expert])
    if a2 >= 0 and b2 >= 0 and rank_down:
        a = _block(tables.pool, a2, intermediate, rank_down).T
        down = Factors(a, _block(tables.pool, b2, hidden, rank_down), scale_down)
    return gate, up, down


def gather_dense_factors(
    tables: DenseLoraTables, slot: int, projection: int, in_size: int
) -> Factors | None:
    """Factors of one (slot, projection); None where it isn't adapted."""
    rank = int(tables.rank[slot, projection])
    a, b = int(tables.offset_a[slot, projection]), int(tables.offset_b[slot, projection])
    if rank == 0 or a < 0 or b < 0:
        return None
    if tables.a_transposed:
        a_block = _block(tables.pool, a, in_size, rank).T
    else:
        a_block = _block(tables.pool, a, rank, in_size)
    b_block = _block(tables.pool, b, tables.out_sizes[projection], rank)
    return Factors(a_block, b_block, float(tables.scale[slot, projection]))


def moe_reference(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    lora: ExpertLoraTables | None = None,
    token_slot: torch.Tensor | None = None,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: ClampedSwiglu | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fused_moe`, one (token, chosen expert) pair at a time. Returns float32 [T, H]."""
    x = x.float()
    w13 = w13.float() if w13_scale is None else dequantise_fp8(w13, w13_scale)
    w2 = w2.float() if w2_scale is None else dequantise_fp8(w2, w2_scale)
    hidden, intermediate = x.shape[1], w2.shape[2]
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        slot = -1 if token_slot is None else int(token_slot[t])
        for k, expert in enumerate(topk_ids[t].tolist()):
            if expert < 0:
                continue
            factors = (None, None, None)
            if lora is not None and slot >= 0:
                factors = gather_factors(lora, slot, expert, hidden, intermediate)
            h = w13[expert] @ x[t]
            if w13_bias is not None:
                h = h + w13_bias[expert].float()
            gate, up = h.split(intermediate)
            if factors[0] is not None:
                gate = gate + factors[0].delta(x[t])
            if factors[1] is not None:
                up = up + factors[1].delta(x[t])
            a = activate_reference(gate, up, clamped)
            y = w2[expert] @ a
            if w2_bias is not None:
                y = y + w2_bias[expert].float()
            if factors[2] is not None:
                y = y + factors[2].delta(a)
            out[t] += topk_weights[t, k].float() * y
    return out


def activate_reference(
    gate: torch.Tensor, up: torch.Tensor, clamped: ClampedSwiglu | None = None
) -> torch.Tensor:
    """SwiGLU, or gpt-oss's clamped form of it."""
    if clamped is None:
        return torch.nn.functional.silu(gate) * up
    gate = gate.clamp(max=clamped.limit)
    up = up.clamp(-clamped.limit, clamped.limit)
    return (up + 1) * gate * torch.sigmoid(clamped.alpha * gate)


def align_reference(
    topk_ids: torch.Tensor, token_slot: torch.Tensor | None, block_size: int, num_experts: int
) -> tuple[list[int], list[int], list[tuple[int, int, int, int]]]:
    """`moe_lora_align_block_size` as lists: sorted pairs, expert of each block, and the blocks'
    segments as (block, slot, first row, end row)."""
    num_tokens, top_k = topk_ids.shape
    slots = [-1] * num_tokens if token_slot is None else token_slot.tolist()
    ids = topk_ids.reshape(-1).tolist()
    pairs: list[int] = []
    block_expert: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    for expert in range(num_experts):
        mine = sorted((slots[p // top_k], p) for p in range(len(ids)) if ids[p] == expert)
        for first in range(0, len(mine), block_size):
            block = mine[first : first + block_size]
            for slot in sorted({slot for slot, _ in block if slot >= 0}):
                rows = [len(pairs) + i for i, (s, _) in enumerate(block) if s == slot]
                segments.append((len(block_expert), slot, rows[0], rows[-1] + 1))
            pairs += [p for _, p in block]
            pairs += [num_tokens * top_k] * (block_size - len(block))
            block_expert.append(expert)
    return pairs, block_expert, segments


def lora_linear_reference(
    x: torch.Tensor, tables: DenseLoraTables, token_slot: torch.Tensor
) -> torch.Tensor:
    """What `lora_linear_` adds: float32 [T, sum(out_sizes)], token by token."""
    x = x.float()
    out = torch.zeros(x.shape[0], sum(tables.out_sizes), device=x.device)
    for t, slot in enumerate(token_slot.tolist()):
        first = 0
        for projection, size in enumerate(tables.out_sizes):
            if slot >= 0:
                factors = gather_dense_factors(tables, slot, projection, x.shape[1])
                if factors is not None:
                    out[t, first : first + size] = factors.delta(x[t])
            first += size
    return out


def _block(pool: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    return pool[offset : offset + rows * columns].view(rows, columns).float()


def scatter_pieces_reference(
    pool: torch.Tensor, staged: torch.Tensor, pieces: torch.Tensor
) -> torch.Tensor:
    """What `scatter_pieces_` makes of `pool`, element by element."""
    result = pool.clone()
    largest = torch.finfo(pool.dtype).max
    for first, place, size, columns, stored in pieces.tolist():
        for n in range(size):
            row, column = divmod(n, stored)
            value = 0.0
            if column < columns:
                value = float(staged[first + row * columns + column])
            result[place + n] = min(max(value, -largest), largest)
    return result
