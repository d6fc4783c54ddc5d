"""The tables of all layers in one buffer per type, so that a slot changes in a few launches.

A *row* is all that the tables say of one slot: an array per type, with the entries of each table
at its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ...adapter_store import PackLayer
from ...kernels import (
    FUSED_GATE_UP,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
)
from ..config import ModelConfig
from ..host_copies import to_device
from ..shard import Shard
from .dense_groups import dense_groups
from .pool_blocks import EXPERTS, LayerBlocks, PoolBlocks

_EXPERT_FACTORS = ("a13", "b13", "a2", "b2")
_ABSENT = {torch.int64: -1, torch.int32: 0, torch.float32: 0}  # offsets; ranks, layouts; scales
_NUMPY: dict[torch.dtype, Any] = {
    torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32
}  # fmt: skip

Key = tuple[int, str, str]  # layer, group, what
Row = dict[torch.dtype, np.ndarray]


class _Flat:
    """Tables [slots, width] of one type, one after another."""

    def __init__(
        self, slots: int, widths: dict[Key, int], dtype: torch.dtype, device: torch.device
    ):
        sizes = np.array(list(widths.values()), np.int64)
        starts = np.cumsum(sizes) - sizes  # in a row
        self._memory = torch.full(
            (slots * int(sizes.sum()),), _ABSENT[dtype], dtype=dtype, device=device
        )
        self._dtype, self.width = dtype, int(sizes.sum())
        self.place = dict(zip(widths, starts.tolist(), strict=True))
        self.tables = {
            key: self._memory[slots * start : slots * (start + n)].view(slots, n)
            for (key, n), start in zip(widths.items(), starts.tolist(), strict=True)
        }
        stride = np.repeat(sizes, sizes)
        first = np.arange(self.width) + np.repeat((slots - 1) * starts, sizes)
        self._stride = torch.from_numpy(stride).to(device)
        self._first = torch.from_numpy(first).to(device)

    def write(self, slot: int, row: torch.Tensor) -> None:
        self._memory.index_copy_(0, self._first + slot * self._stride, row)

    def clear(self, slot: int) -> None:
        self._memory.index_fill_(0, self._first + slot * self._stride, _ABSENT[self._dtype])


class SlotTables:
    """The pool's tables of one rank.

    Attributes:
        experts: of each layer. dense: of each layer, as in `dense_groups`.
    """

    def __init__(
        self,
        model: ModelConfig,
        shard: Shard,
        blocks: PoolBlocks,
        pool: torch.Tensor,
        slots: int,
        max_rank: int,
        rank_multiple: int,
    ):
        self._shard, self._blocks = shard, blocks
        widths: dict[torch.dtype, dict[Key, int]] = {dtype: {} for dtype in _ABSENT}
        for n in range(model.num_layers):
            e = len(shard.experts) if n >= model.dense_layers else 0
            for factor in _EXPERT_FACTORS:
                widths[torch.int64][n, EXPERTS, factor] = e
            widths[torch.int32][n, EXPERTS, "rank"] = 3 * e
            widths[torch.int32][n, EXPERTS, "layout"] = 1
            widths[torch.float32][n, EXPERTS, "scale"] = 3 * e
            for name, group in dense_groups(shard, n).items():
                p = len(group.targets)
                widths[torch.int64][n, name, "a"] = widths[torch.int64][n, name, "b"] = p
                widths[torch.int32][n, name, "rank"] = p
                widths[torch.float32][n, name, "scale"] = p
        self._flat = {dtype: _Flat(slots, widths[dtype], dtype, pool.device) for dtype in _ABSENT}
        offsets, ints, floats = (self._flat[dtype].tables for dtype in _ABSENT)
        promises = {"max_rank": max_rank, "rank_multiple": rank_multiple}
        self.experts: list[ExpertLoraTables] = []
        self.dense: list[dict[str, DenseLoraTables]] = []
        for n in range(model.num_layers):
            e = len(shard.experts) if n >= model.dense_layers else 0
            self.experts.append(
                ExpertLoraTables(
                    pool,
                    *(offsets[n, EXPERTS, factor] for factor in _EXPERT_FACTORS),
                    rank=ints[n, EXPERTS, "rank"].view(slots, e, 3),
                    scale=floats[n, EXPERTS, "scale"].view(slots, e, 3),
                    layout=ints[n, EXPERTS, "layout"].view(slots),
                    **promises,
                )
            )
            self.dense.append(
                {
                    name: DenseLoraTables(
                        pool,
                        offsets[n, name, "a"],
                        offsets[n, name, "b"],
                        rank=ints[n, name, "rank"],
                        scale=floats[n, name, "scale"],
                        out_sizes=group.out_sizes,
                        a_transposed=group.input_cut,
                        **promises,
                    )
                    for name, group in dense_groups(shard, n).items()
                }
            )

    def row(self, layers: Iterable[tuple[PackLayer, LayerBlocks, np.ndarray]]) -> Row:
        """What the tables are to say of an adapter.

        Args:
            layers: the adapted ones, their blocks, and int64 where each block lies.
        """
        row = {
            dtype: np.full(flat.width, _ABSENT[dtype], _NUMPY[dtype])
            for dtype, flat in self._flat.items()
        }
        for layer, blocks, bases in layers:
            at = 0
            for group in blocks.groups:
                here = self._part(row, torch.int64, (layer.index, group.group, group.factor))
                here[group.entries] = bases[at : at + group.entries.size]
                at += group.entries.size
            self._set_dense(row, layer)
            self._set_experts(row, layer, blocks)
        return row

    def write(self, slot: int, row: Row) -> None:
        """Makes the tables say `row` of `slot`, from the next launch of this stream on."""
        there = to_device({str(dtype): part for dtype, part in row.items()}, self._device)
        for dtype, flat in self._flat.items():
            flat.write(slot, there[str(dtype)])

    def clear(self, slot: int) -> None:
        """Makes the tables say 'absent' of `slot`."""
        for flat in self._flat.values():
            flat.clear(slot)

    @property
    def _device(self) -> torch.device:
        return self.experts[0].pool.device

    def _part(self, row: Row, dtype: torch.dtype, key: Key) -> np.ndarray:
        flat = self._flat[dtype]
        start = flat.place[key]
        return row[dtype][start : start + flat.tables[key].shape[1]]

    def _set_dense(self, row: Row, layer: PackLayer) -> None:
        for name, p, target in self._homes(layer.index):
            if (entry := layer.dense.get(target)) is not None:
                ranks = self._part(row, torch.int32, (layer.index, name, "rank"))
                ranks[p] = self._blocks.stored(entry.rank)
                self._part(row, torch.float32, (layer.index, name, "scale"))[p] = entry.scale

    def _homes(self, layer: int) -> Iterator[tuple[str, int, str]]:
        for name, group in dense_groups(self._shard, layer).items():
            for p, target in enumerate(group.targets):
                yield name, p, target

    def _set_experts(self, row: Row, layer: PackLayer, blocks: LayerBlocks) -> None:
        experts, held, local = layer.experts, blocks.held, blocks.local
        if experts is None or not held.size:
            return
        n = layer.index
        ranks = self._part(row, torch.int32, (n, EXPERTS, "rank")).reshape(-1, 3)
        ranks[local] = blocks.ranks
        scales = self._part(row, torch.float32, (n, EXPERTS, "scale")).reshape(-1, 3)
        scales[local] = np.array(experts.scale, np.float32)[held]
        bits = FUSED_GATE_UP * experts.fused_gate_up
        for shared, bit, factor in (
            (experts.shared_a13, SHARED_A13, "a13"),
            (experts.shared_b2, SHARED_B2, "b2"),
        ):
            if shared:
                offsets = self._part(row, torch.int64, (n, EXPERTS, factor))
                offsets[local] = offsets[local[0]]
                bits |= bit
        self._part(row, torch.int32, (n, EXPERTS, "layout"))[:] = bits
