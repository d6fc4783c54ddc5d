"""Random LoRA factors in a pool, as tests need them.

Blocks lie in random order, with gaps between them; every element that no table names is NaN, so
that a read beyond a block shows up in the result.
"""

from __future__ import annotations

import numpy as np
import torch
from loraplex.kernels import (
    FUSED_GATE_UP,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
)


class PoolBuilder:
    """Collects blocks, then lays them out in one NaN-filled pool."""

    def __init__(self, rng: np.random.Generator, alignment: int = 4) -> None:
        self._rng = rng
        self._alignment = alignment  # in elements
        self._sizes: list[int] = []

    def block(self, size: int) -> int:
        """Ask for `size` elements; returns a handle that `offsets` translates after `build`."""
        self._sizes.append(size)
        return len(self._sizes) - 1

    def build(self, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
        """The pool, and the offset of each handle."""
        step = self._alignment
        offsets = np.zeros(len(self._sizes), dtype=np.int64)
        end = 0
        for handle in self._rng.permutation(len(self._sizes)):
            end = -(-(end + int(self._rng.integers(1, 4 * step))) // step) * step
            offsets[handle] = end
            end += self._sizes[handle]
        pool = np.full(end + 4 * step, np.nan, dtype=np.float32)
        for offset, size in zip(offsets, self._sizes, strict=True):
            # Of the size that a product of two factors keeps activations of order one.
            pool[offset : offset + size] = self._rng.standard_normal(size) * 0.25
        return torch.from_numpy(pool).to(dtype), offsets


def random_expert_tables(
    seed: int,
    slots: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    ranks: tuple[int, ...] = (0, 1, 3, 8, 16),
    one_rank_per_slot: bool = False,
    layouts: tuple[int, ...] = (
        0,
        FUSED_GATE_UP,
        SHARED_B2,
        FUSED_GATE_UP | SHARED_A13,
        FUSED_GATE_UP | SHARED_A13 | SHARED_B2,
    ),
    absent: float = 0.2,
    unused_slots: tuple[int, ...] = (),
    alignment: int = 4,
    dtype: torch.dtype = torch.float32,
) -> ExpertLoraTables:
    """Tables of `slots` adapters over `num_experts` experts, each adapter with a layout of its own.

    Args:
        ranks: ranks to draw from, per (slot, expert, projection) or, with one_rank_per_slot, per
            slot. Where one factor is shared by all experts they have one rank, as the layout asks.
        absent: chance that an adapter leaves an expert alone, which lacks A, B or both; its rank
            and scale entries are then drawn all the same, and must not matter.
        unused_slots: slots that hold nothing (offsets -1, ranks and scales arbitrary).
        alignment: of blocks, in elements.
    """
    rng = np.random.default_rng(seed)
    builder = PoolBuilder(rng, alignment)
    handle = np.full((4, slots, num_experts), -1, dtype=np.int64)
    rank = rng.choice(ranks, size=(slots, num_experts, 3)).astype(np.int32)
    scale = rng.uniform(0.25, 2.0, size=(slots, num_experts, 3)).astype(np.float32)
    layout = rng.choice(layouts, size=slots).astype(np.int32)
    for slot in range(slots):
        if slot in unused_slots:
            continue
        if one_rank_per_slot:
            rank[slot] = rng.choice(ranks)
        if layout[slot] & FUSED_GATE_UP:
            rank[slot, :, 1] = rank[slot, :, 0]
        if layout[slot] & SHARED_A13:
            rank[slot, :, :2] = rank[slot, 0, :2]
        if layout[slot] & SHARED_B2:
            rank[slot, :, 2] = rank[slot, 0, 2]
        _add_blocks(builder, handle[:, slot], rank[slot], int(layout[slot]), hidden, intermediate)
        for factors in (0, 2):  # gate/up and down apart
            handle[factors : factors + 2, slot][_gone(rng, absent, num_experts)] = -1
    pool, place = builder.build(dtype)
    offset = np.where(handle >= 0, place[handle] if len(place) else -1, -1)
    a13, b13, a2, b2 = (torch.from_numpy(part.copy()) for part in offset)
    return ExpertLoraTables(
        pool=pool,
        offset_a13=a13,
        offset_b13=b13,
        offset_a2=a2,
        offset_b2=b2,
        rank=torch.from_numpy(rank),
        scale=torch.from_numpy(scale),
        layout=torch.from_numpy(layout),
    )


def _gone(rng: np.random.Generator, absent: float, count: int) -> np.ndarray:
    """bool [2, count]: which A and which B are missing. One is as good as both."""
    missing = np.array([(True, False), (False, True), (True, True)])
    return (missing[rng.integers(0, 3, count)] & (rng.random((count, 1)) < absent)).T


def _add_blocks(builder, handle, rank, layout, hidden, intermediate) -> None:
    """Fill `handle` [4, E] of one slot; factors of no size at all get no block."""
    shared_a13 = shared_b2 = None
    for expert, (gate, up, down) in enumerate(rank.tolist()):
        a13_rows = max(gate, up) if layout & FUSED_GATE_UP else gate + up
        if a13_rows:
            if shared_a13 is None or not layout & SHARED_A13:
                shared_a13 = builder.block(a13_rows * hidden)
            handle[0, expert] = shared_a13
            handle[1, expert] = builder.block(intermediate * (gate + up))
        if down:
            if shared_b2 is None or not layout & SHARED_B2:
                shared_b2 = builder.block(hidden * down)
            handle[2, expert] = builder.block(intermediate * down)
            handle[3, expert] = shared_b2


def random_dense_tables(
    seed: int,
    slots: int,
    in_size: int,
    out_sizes: tuple[int, ...],
    *,
    ranks: tuple[int, ...] = (0, 1, 3, 8, 16),
    a_transposed: bool = False,
    absent: float = 0.2,
    unused_slots: tuple[int, ...] = (),
    alignment: int = 4,
    dtype: torch.dtype = torch.float32,
) -> DenseLoraTables:
    """Tables of `slots` adapters on projections with `out_sizes` outputs; see above."""
    rng = np.random.default_rng(seed)
    builder = PoolBuilder(rng, alignment)
    shape = (slots, len(out_sizes))
    handle = np.full((2, *shape), -1, dtype=np.int64)
    rank = rng.choice(ranks, size=shape).astype(np.int32)
    for slot in range(slots):
        for projection, out_size in enumerate(out_sizes):
            if slot in unused_slots or rank[slot, projection] == 0:
                continue
            handle[0, slot, projection] = builder.block(int(rank[slot, projection]) * in_size)
            handle[1, slot, projection] = builder.block(int(rank[slot, projection]) * out_size)
        handle[:, slot][_gone(rng, absent, len(out_sizes))] = -1
    pool, place = builder.build(dtype)
    offset = np.where(handle >= 0, place[handle] if len(place) else -1, -1)
    return DenseLoraTables(
        pool=pool,
        offset_a=torch.from_numpy(offset[0].copy()),
        offset_b=torch.from_numpy(offset[1].copy()),
        rank=torch.from_numpy(rank),
        scale=torch.from_numpy(rng.uniform(0.25, 2.0, size=shape).astype(np.float32)),
        out_sizes=out_sizes,
        a_transposed=a_transposed,
    )


def random_routing(
    seed: int, tokens: int, num_experts: int, top_k: int, *, skipped: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights float32 [T, K] that sum to one, topk_ids int32 [T, K], distinct per token.

    `skipped` is the chance that an id is -1 (an expert of another rank).
    """
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, num_experts)).argsort(1)[:, :top_k].astype(np.int32)
    ids[rng.random(ids.shape) < skipped] = -1
    weights = rng.random((tokens, top_k), dtype=np.float32) + 0.1
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(weights), torch.from_numpy(ids)
