"""The adapter pool of one rank: factors in one flat buffer, tables that point into it.

Capacity is bytes. Every block (one factor of one adapter, layer and expert) lies where the pages
had room; the tables of `loraplex.kernels` say where. Slots only number the resident adapters.

A GPU reads factors 16 bytes at a time where every rank is a multiple of 8: there, ranks are rounded
up when an adapter is loaded, with rows of A and columns of B that are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..adapter_store import ExpertEntry, Pack, PackLayer
from ..kernels import (
    FUSED_GATE_UP,
    MAX_RANK,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
)
from .config import ModelConfig
from .errors import AdapterTooLarge, PoolFull, WorkerError
from .pool_pages import BlockLayout, Pages
from .shard import Shard

_ALIGN_BYTES = 16
_FLOAT16_MAX = torch.finfo(torch.float16).max
_MIN_PAGE, _MAX_PAGE = 16 << 10, 2 << 20


@dataclass
class _Block:
    """One tensor to place: how many elements, where from, and which table entries name it."""

    elements: int
    read: Callable[[], np.ndarray]  # as it is to be stored
    table: torch.Tensor  # an offset table
    index: tuple[int, ...]  # of the entry that gets the offset
    shift: int = 0  # elements before it in a block of several parts; only shift 0 sets the table


def page_bytes(pool_bytes: int) -> int:
    """About 1/256 of the pool, a power of two between 16 KiB and 2 MiB."""
    page = 1 << max(0, (pool_bytes // 256)).bit_length()
    return min(max(page, _MIN_PAGE), _MAX_PAGE)


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
        self._model, self._shard = model, shard
        self._dtype, self._device, self._poison = dtype, device, poison
        self._itemsize = torch.empty(0, dtype=dtype).element_size()
        self._max_rank, self._multiple = max_rank, rank_multiple
        self.page_bytes = page_bytes(pool_bytes)
        self._page = self.page_bytes // self._itemsize
        total = pool_bytes // self.page_bytes
        accounts = range(shard.ep) if shard.rank == 0 else (shard.ep_rank,)
        self._pages = {ep_rank: Pages(total) for ep_rank in accounts}
        self.buffer = torch.zeros(total * self._page, dtype=dtype, device=device)
        self.max_slots = max_slots
        self._runs: dict[int, dict[int, list[tuple[int, int]]]] = {}  # slot -> ep rank -> runs
        self.experts: list[ExpertLoraTables] = []
        self.qkv: list[DenseLoraTables] = []
        self.o: list[DenseLoraTables] = []
        self.shared_gate_up: list[DenseLoraTables] = []  # empty without shared experts
        self.shared_down: list[DenseLoraTables] = []
        for _ in range(model.num_layers):
            self.experts.append(self._expert_tables())
            self.qkv.append(self._dense_tables((shard.q_size, shard.kv_size, shard.kv_size)))
            self.o.append(self._dense_tables((model.hidden_size,), a_transposed=True))
            if model.shared_expert_size:
                self.shared_gate_up.append(self._dense_tables((shard.shared_intermediate,) * 2))
                self.shared_down.append(self._dense_tables((model.hidden_size,), a_transposed=True))

    @property
    def total_bytes(self) -> int:
        return self._pages[self._shard.ep_rank].total * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """On the fullest of the ranks that this one keeps account of."""
        return self.total_bytes - self._free_bytes

    @property
    def _free_bytes(self) -> int:
        return min(pages.free for pages in self._pages.values()) * self.page_bytes

    def required_bytes(self, pack: Pack) -> int:
        """Bytes of pages that `pack` takes, resident, on the rank where it takes most."""
        return max(layout.pages for layout in self._layouts(pack).values()) * self.page_bytes

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
        if slot in self._runs:
            raise WorkerError(f"slot {slot} is in use")
        self._check_rank(pack)
        layouts = self._layouts(pack)
        needed = max(layout.pages for layout in layouts.values()) * self.page_bytes
        runs = self._allocate(layouts)
        if runs is None:
            raise PoolFull(
                f"adapter {pack.digest[:12]} takes {needed} bytes, {self._free_bytes} are free"
            )
        self._runs[slot] = runs
        mine = self._shard.ep_rank
        starts = [first for first, _ in runs[mine]]
        places = iter(layouts[mine].places)
        base = 0
        for block in self._blocks(pack, slot, mine):
            if block.shift == 0:
                run, offset = next(places)
                base = starts[run] * self._page + offset
                block.table[block.index] = base
            self._copy(block, base + block.shift)
        self._set_ranks(pack, slot)
        return needed

    def unload(self, slot: int) -> None:
        """Frees `slot`: its table entries say 'absent' before its pages can be taken again."""
        for tables in self.experts:
            for offsets in (
                tables.offset_a13, tables.offset_b13, tables.offset_a2, tables.offset_b2
            ):  # fmt: skip
                offsets[slot] = -1
            tables.rank[slot] = 0
            tables.layout[slot] = 0
        for tables in (*self.qkv, *self.o, *self.shared_gate_up, *self.shared_down):
            tables.offset_a[slot] = -1
            tables.offset_b[slot] = -1
            tables.rank[slot] = 0
        runs = self._runs.pop(slot)
        if self._poison:
            for first, pages in runs[self._shard.ep_rank]:
                self.buffer[first * self._page : (first + pages) * self._page] = float("nan")
        self._release(runs)

    def _allocate(
        self, layouts: Mapping[int, BlockLayout]
    ) -> dict[int, list[tuple[int, int]]] | None:
        """Runs (first page, pages) by ep rank; None, and nothing taken, unless all have room."""
        runs: dict[int, list[tuple[int, int]]] = {}
        for ep_rank, layout in layouts.items():
            starts = self._pages[ep_rank].allocate(layout.runs)
            if starts is None:
                self._release(runs)
                return None
            runs[ep_rank] = list(zip(starts, layout.runs, strict=True))
        return runs

    def _release(self, runs: Mapping[int, list[tuple[int, int]]]) -> None:
        for ep_rank, mine in runs.items():
            for first, pages in mine:
                self._pages[ep_rank].release(first, pages)

    def _check_rank(self, pack: Pack) -> None:
        rank = max((rank for layer in pack.layers for rank in _ranks(layer)), default=0)
        if rank > self._max_rank:
            raise AdapterTooLarge(
                f"adapter {pack.digest[:12]} has rank {rank}, at most {self._max_rank} is served; "
                f"raise max_lora_rank (up to {MAX_RANK})"
            )

    def _stored(self, rank: int) -> int:
        """The rank that the pool holds in place of `rank`."""
        return -(-rank // self._multiple) * self._multiple

    def _layouts(self, pack: Pack) -> dict[int, BlockLayout]:
        """By ep rank, of those that this one keeps account of."""
        return {r: self._layout(self._blocks(pack, 0, r)) for r in self._pages}

    def _layout(self, blocks: Iterable[_Block]) -> BlockLayout:
        # Both are powers of two.
        align = max(_ALIGN_BYTES // self._itemsize, self._multiple)
        sizes: list[int] = []
        for block in blocks:
            if block.shift == 0:
                sizes.append(0)
            sizes[-1] = -(-(block.shift + block.elements) // align) * align
        return BlockLayout(sizes, self._page)

    def _blocks(self, pack: Pack, slot: int, ep_rank: int) -> Iterator[_Block]:
        """Every tensor of `pack` that a rank of `ep_rank` holds, parts of one block right after
        another. Those of other experts than this rank's are good for their sizes only."""
        shard = self._shard
        for layer in pack.layers:
            n = layer.index
            for name, tables, p in self._dense_homes(n):
                entry = layer.dense.get(name)
                if entry is None:
                    continue
                rows = shard.rows(name)
                a_rows, b_rows = (rows, None) if tables.a_transposed else (None, rows)
                a = pack.dense_a(layer, name, rows=a_rows)
                b = pack.dense_b(layer, name, rows=b_rows)
                for factor, axis, offsets in (
                    (a, 1 if tables.a_transposed else 0, tables.offset_a),
                    (b, 1, tables.offset_b),
                ):
                    stored = self._stored(factor.shape[axis])
                    yield _Block(
                        factor.size // factor.shape[axis] * stored,
                        lambda f=factor, axis=axis, stored=stored: _padded(f, axis, stored),
                        offsets,
                        (slot, p),
                    )
            if layer.experts is None:
                continue
            for nth, (i, local) in enumerate(self._held(layer.experts, ep_rank)):
                at = (slot, local)
                yield from self._expert_blocks(pack, n, i, at, layer.experts, nth == 0)

    def _held(self, experts: ExpertEntry, ep_rank: int) -> list[tuple[int, int]]:
        """Position in the pack and number on the rank, of the experts that `ep_rank` holds."""
        held = self._shard.experts_of(ep_rank)
        return [(i, e - held.start) for i, e in enumerate(experts.ids) if e in held]

    def _expert_blocks(
        self,
        pack: Pack,
        layer: int,
        i: int,
        at: tuple[int, int],
        experts: ExpertEntry,
        first: bool,
    ) -> Iterator[_Block]:
        """Of one expert; the first one's carry what all share."""
        tables = self.experts[layer]
        tp = (self._shard.expert_tp_rank, self._shard.expert_tp)
        local = self._shard.intermediate
        gate, up, down = experts.rank[i]
        a_ranks = (gate,) if experts.fused_gate_up else (gate, up)
        a_rows = sum(map(self._stored, a_ranks))
        hidden = self._model.hidden_size
        if a_rows and (first or not experts.shared_a13):
            yield _Block(
                a_rows * hidden,
                lambda: self._padded_parts(pack.a13(layer, i), a_ranks),
                tables.offset_a13,
                at,
            )
        shift = 0
        parts: tuple[tuple[Literal["gate", "up"], int], ...] = (
            ("gate", self._stored(gate)),
            ("up", self._stored(up)),
        )
        for part, rank in parts:
            if rank:
                yield _Block(
                    local * rank,
                    lambda part=part, rank=rank: _padded(pack.b13(layer, i, part, *tp), 1, rank),
                    tables.offset_b13,
                    at,
                    shift,
                )
                shift += local * rank
        if down:
            columns = self._stored(down)
            yield _Block(
                local * columns,
                lambda: _padded(pack.a2(layer, i, *tp), 1, columns),
                tables.offset_a2,
                at,
            )
            if first or not experts.shared_b2:
                yield _Block(
                    hidden * columns,
                    lambda: _padded(pack.b2(layer, i), 1, columns),
                    tables.offset_b2,
                    at,
                )

    def _padded_parts(self, a: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
        """`a` [sum(ranks), H] with the rows of each part made up to its stored rank."""
        if all(self._stored(rank) == rank for rank in ranks):
            return a
        ends = np.cumsum(ranks)
        rows = [a[end - rank : end] for end, rank in zip(ends, ranks, strict=True)]
        return np.concatenate([_padded(part, 0, self._stored(len(part))) for part in rows])

    def _copy(self, block: _Block, offset: int) -> None:
        source = block.read()
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
                    tables.rank[slot, p] = self._stored(entry.rank)
                    tables.scale[slot, p] = entry.scale
            experts = layer.experts
            held = self._held(experts, self._shard.ep_rank) if experts is not None else []
            if experts is None or not held:
                continue
            tables = self.experts[layer.index]
            ids = torch.tensor([local for _, local in held])
            ranks = [[self._stored(rank) for rank in experts.rank[i]] for i, _ in held]
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
        for p, name in enumerate(("q_proj", "k_proj", "v_proj")):
            yield name, self.qkv[layer], p
        yield "o_proj", self.o[layer], 0
        if self.shared_down:
            yield "shared_expert.gate_proj", self.shared_gate_up[layer], 0
            yield "shared_expert.up_proj", self.shared_gate_up[layer], 1
            yield "shared_expert.down_proj", self.shared_down[layer], 0

    def _expert_tables(self) -> ExpertLoraTables:
        s, e = self.max_slots, len(self._shard.experts)

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
            max_rank=self._stored(self._max_rank),
            rank_multiple=self._multiple,
        )

    def _dense_tables(
        self, out_sizes: tuple[int, ...], a_transposed: bool = False
    ) -> DenseLoraTables:
        s, p = self.max_slots, len(out_sizes)
        return DenseLoraTables(
            pool=self.buffer,
            offset_a=torch.full((s, p), -1, dtype=torch.int64, device=self._device),
            offset_b=torch.full((s, p), -1, dtype=torch.int64, device=self._device),
            rank=torch.zeros(s, p, dtype=torch.int32, device=self._device),
            scale=torch.zeros(s, p, dtype=torch.float32, device=self._device),
            out_sizes=out_sizes,
            a_transposed=a_transposed,
            max_rank=self._stored(self._max_rank),
            rank_multiple=self._multiple,
        )


def _ranks(layer: PackLayer) -> Iterator[int]:
    """Of every factor pair that the layer has."""
    for entry in layer.dense.values():
        yield entry.rank
    if layer.experts is not None:
        for ranks in layer.experts.rank:
            yield from ranks


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """`array`, 2-D, with zeros behind it up to `size` along `axis`; itself where it has that."""
    if array.shape[axis] == size:
        return array
    rows, columns = array.shape
    result = np.zeros((size, columns) if axis == 0 else (rows, size), array.dtype)
    result[:rows, :columns] = array
    return result
