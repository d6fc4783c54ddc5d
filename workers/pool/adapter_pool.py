"""The adapter pool of one rank: factors in one flat buffer, tables that point into it.

Capacity is bytes. Every block (one factor of one adapter, layer and expert) lies where the pages
had room; the tables of `loraplex.kernels` say where. Slots only number the resident adapters.

A GPU reads factors 16 bytes at a time where every rank is a multiple of 8: there, ranks are rounded
up when an adapter is loaded, with rows of A and columns of B that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ...adapter_store import Pack, PackLayer
from ...kernels import (
    FUSED_GATE_UP,
    MAX_RANK,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
)
from ..config import ModelConfig
from ..errors import AdapterTooLarge, PoolFull, WorkerError
from ..shard import Shard
from .dense_groups import DenseGroup, dense_groups
from .pool_account import Layouts, PoolAccount, Run
from .pool_blocks import EXPERTS, Block, PoolBlocks

_FLOAT16_MAX = torch.finfo(torch.float16).max


class AdapterPool:
    """Resident adapters of one rank.

    Ranks with other experts need other bytes for the same adapter. Rank 0 decides for all of them,
    so it keeps account of their pages too, and only what fits everywhere is loaded.

    Not thread-safe: the engine's thread calls it between steps. `load` copies; on a GPU the copies
    are on the stream of the steps, so a block can't be rewritten while a step still reads it.
    """

    def __init__(
        self,
        model: ModelConfig,
        shard: Shard,
        pool_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int,
        max_rank: int = MAX_RANK,
        rank_multiple: int = 1,
        poison: bool = False,
    ):
        """
        Args:
            pool_bytes: size of the buffer, rounded down to whole pages.
            dtype: of the factors in the pool; packs are cast to it when loaded.
            max_rank: adapters of a larger one are refused.
            rank_multiple: ranks are stored as multiples of this power of two.
            poison: overwrite freed blocks with NaN (tests).

        Raises:
            WorkerError: max_rank isn't from 1 to MAX_RANK.
        """
        if not 1 <= max_rank <= MAX_RANK:
            raise WorkerError(f"max_lora_rank must be from 1 to {MAX_RANK}, got {max_rank}")
        self._shard = shard
        self._dtype, self._device, self._poison = dtype, device, poison
        self._max_rank, self._multiple = max_rank, rank_multiple
        self._blocks = PoolBlocks(shard, rank_multiple)
        ep_ranks = range(shard.ep) if shard.rank == 0 else (shard.ep_rank,)
        self._account = PoolAccount(self._blocks, pool_bytes, dtype.itemsize, ep_ranks)
        self.buffer = torch.zeros(
            self._account.total_bytes // dtype.itemsize, dtype=dtype, device=device
        )
        self.max_slots = max_slots
        self.experts: list[ExpertLoraTables] = []
        self.dense: list[dict[str, DenseLoraTables]] = []  # of each layer, as in `dense_groups`
        for layer in range(model.num_layers):
            experts = len(shard.experts) if layer >= model.dense_layers else 0
            self.experts.append(self._expert_tables(experts))
            groups = dense_groups(shard, layer)
            self.dense.append({name: self._dense_tables(group) for name, group in groups.items()})

    @property
    def total_bytes(self) -> int:
        return self._account.total_bytes

    @property
    def used_bytes(self) -> int:
        """On the fullest of the ranks that this one keeps account of."""
        return self._account.used_bytes

    def required_bytes(self, pack: Pack) -> int:
        """Bytes of pages that `pack` takes, resident, on the rank where it takes most."""
        return self._account.layouts(pack.layers).nbytes

    def check_fits(self, pack: Pack) -> None:
        """Raises AdapterTooLarge where `pack` can't be loaded even into the empty pool."""
        self._check_rank(pack)
        needed = self.required_bytes(pack)
        if needed > self.total_bytes:
            raise AdapterTooLarge(
                f"adapter {pack.digest[:12]} takes {needed} bytes, the pool has "
                f"{self.total_bytes}; raise pool_bytes"
            )

    def load(self, slot: int, pack: Pack) -> int:
        """Makes `pack` resident as `slot`.

        Returns:
            Bytes of pages taken, as `required_bytes`.

        Raises:
            PoolFull: it doesn't fit beside what is resident.
            AdapterTooLarge: a rank is over the limit, which the tables promise to the kernels.
        """
        if self._account.has(slot):
            raise WorkerError(f"slot {slot} is in use")
        self._check_rank(pack)
        layouts = self._account.layouts(pack.layers)
        runs = self._account.take(slot, layouts)
        if runs is None:
            raise PoolFull(
                f"adapter {pack.digest[:12]} takes {layouts.nbytes} bytes, "
                f"{self._account.free_bytes} are free"
            )
        try:
            self._fill(slot, pack, layouts, runs)
        except BaseException:
            self.unload(slot)  # or the slot could never be loaded again
            raise
        return layouts.nbytes

    def _fill(self, slot: int, pack: Pack, layouts: Layouts, runs: Mapping[int, list[Run]]) -> None:
        """Copies the factors to the slot's pages and sets its tables."""
        mine = self._shard.ep_rank
        starts = [first * self._account.page for first, _ in runs[mine]]
        places = iter(layouts.of_rank[mine].places)
        base = 0
        for block in self._blocks.blocks(pack.layers, mine):
            if block.shift == 0:
                run, offset = next(places)
                base = starts[run] + offset
                self._offsets(block)[slot, block.entry] = base
            self._copy(pack, block, base + block.shift)
        self._set_ranks(pack, slot)

    def unload(self, slot: int) -> None:
        """Frees `slot`: its table entries say 'absent' before its pages can be taken again."""
        for tables in self.experts:
            for offsets in (
                tables.offset_a13, tables.offset_b13, tables.offset_a2, tables.offset_b2
            ):  # fmt: skip
                offsets[slot] = -1
            tables.rank[slot] = 0
            tables.layout[slot] = 0
        for tables in (tables for layer in self.dense for tables in layer.values()):
            tables.offset_a[slot] = -1
            tables.offset_b[slot] = -1
            tables.rank[slot] = 0
        runs = self._account.release(slot)
        if self._poison:
            page = self._account.page
            for first, pages in runs[self._shard.ep_rank]:
                self.buffer[first * page : (first + pages) * page] = float("nan")

    def _check_rank(self, pack: Pack) -> None:
        rank = largest_rank(pack)
        if rank > self._max_rank:
            raise AdapterTooLarge(
                f"adapter {pack.digest[:12]} has rank {rank}, at most {self._max_rank} is served; "
                f"raise max_lora_rank (up to {MAX_RANK})"
            )

    def _offsets(self, block: Block) -> torch.Tensor:
        """The offset table [slots, entries] that names `block`."""
        if block.group == EXPERTS:
            tables = self.experts[block.layer]
        else:
            tables = self.dense[block.layer][block.group]
        return getattr(tables, f"offset_{block.factor}")

    def _copy(self, pack: Pack, block: Block, offset: int) -> None:
        source = block.read(pack)
        if source.size != block.elements:
            raise WorkerError(
                f"a block of {source.size} elements came where {block.elements} were expected"
            )
        # torch takes no read-only memory, which views of a pack's file are: those are copied.
        flat = np.require(source, requirements=("C", "W")).reshape(-1)
        if flat.dtype == np.uint16:
            tensor = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(flat)
        if self.buffer.dtype == torch.float16:
            # Uploads are finite in their own precision. An infinite factor would reach the rows of
            # other adapters in a product that they share.
            tensor = tensor.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        self.buffer[offset : offset + block.elements].copy_(tensor)

    def _set_ranks(self, pack: Pack, slot: int) -> None:
        for layer in pack.layers:
            for name, tables, p in self._dense_homes(layer.index):
                if (entry := layer.dense.get(name)) is not None:
                    tables.rank[slot, p] = self._blocks.stored(entry.rank)
                    tables.scale[slot, p] = entry.scale
            experts = layer.experts
            held = self._blocks.held(experts, self._shard.ep_rank) if experts is not None else []
            if experts is None or not held:
                continue
            tables = self.experts[layer.index]
            ids = torch.tensor([local for _, local in held])
            ranks = [[self._blocks.stored(rank) for rank in experts.rank[i]] for i, _ in held]
            scales = [experts.scale[i] for i, _ in held]
            tables.rank[slot, ids] = torch.tensor(ranks, dtype=torch.int32).to(self._device)
            tables.scale[slot, ids] = torch.tensor(scales, dtype=torch.float32).to(self._device)
            bits = FUSED_GATE_UP * experts.fused_gate_up
            for shared, bit, offsets in (
                (experts.shared_a13, SHARED_A13, tables.offset_a13),
                (experts.shared_b2, SHARED_B2, tables.offset_b2),
            ):
                if shared:
                    offsets[slot, ids] = offsets[slot, ids[0]].clone()
                    bits |= bit
            tables.layout[slot] = bits

    def _dense_homes(self, layer: int) -> Iterator[tuple[str, DenseLoraTables, int]]:
        for name, group in dense_groups(self._shard, layer).items():
            for p, target in enumerate(group.targets):
                yield target, self.dense[layer][name], p

    def _expert_tables(self, experts: int) -> ExpertLoraTables:
        s, e = self.max_slots, experts

        def offsets() -> torch.Tensor:
            return torch.full((s, e), -1, dtype=torch.int64, device=self._device)

        return ExpertLoraTables(
            pool=self.buffer,
            offset_a13=offsets(),
            offset_b13=offsets(),
            offset_a2=offsets(),
            offset_b2=offsets(),
            rank=torch.zeros(s, e, 3, dtype=torch.int32, device=self._device),
            scale=torch.zeros(s, e, 3, dtype=torch.float32, device=self._device),
            layout=torch.zeros(s, dtype=torch.int32, device=self._device),
            max_rank=self._blocks.stored(self._max_rank),
            rank_multiple=self._multiple,
        )

    def _dense_tables(self, group: DenseGroup) -> DenseLoraTables:
        s, p = self.max_slots, len(group.targets)
        return DenseLoraTables(
            pool=self.buffer,
            offset_a=torch.full((s, p), -1, dtype=torch.int64, device=self._device),
            offset_b=torch.full((s, p), -1, dtype=torch.int64, device=self._device),
            rank=torch.zeros(s, p, dtype=torch.int32, device=self._device),
            scale=torch.zeros(s, p, dtype=torch.float32, device=self._device),
            out_sizes=group.out_sizes,
            a_transposed=group.input_cut,
            max_rank=self._blocks.stored(self._max_rank),
            rank_multiple=self._multiple,
        )


def largest_rank(pack: Pack) -> int:
    """Of all that the pack adapts."""
    return max((rank for layer in pack.layers for rank in _ranks(layer)), default=0)


def _ranks(layer: PackLayer) -> Iterator[int]:
    """Of every factor pair that the layer has."""
    for entry in layer.dense.values():
        yield entry.rank
    if layer.experts is not None:
        for ranks in layer.experts.rank:
            yield from ranks
