"""The adapter pool of one rank: factors in one flat buffer, tables that point into it.

Capacity is bytes. Every block (one factor of one adapter, layer and expert) lies where the pages
had room; the tables of `loraplex.kernels` say where. Slots only number the resident adapters.

A GPU reads factors 16 bytes at a time where every rank is a multiple of 8: there, ranks are rounded
up when an adapter is loaded, with rows of A and columns of B that are zero.

A load has three steps: `start_load` reserves the pages, a thread fills them, `show` makes the
tables say so. Pages are free for another adapter once no launched step names them: `unload` is
called when no sequence of a launched step holds the slot, and what a stream may still read before
it comes to that is behind the fence that the next load of the pages waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ...adapter_store import Pack, PackLayer
from ...kernels import MAX_RANK
from ..config import ModelConfig
from ..errors import AdapterTooLarge, PoolFull, WorkerError
from ..shard import Shard
from .loader import Contents, Load, Loader
from .pinned import PinnedMemory
from .pool_account import Layouts, PoolAccount, Run
from .pool_blocks import LayerBlocks, PoolBlocks
from .pool_pieces import Chunks, LayerPieces, layer_pieces
from .slot_tables import SlotTables
from .stager import Transfer, make_stager

# Of layers of other shapes; one takes up to a few hundred KB.
_MOST_PIECES = 16
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterPool:
    """Resident adapters of one rank.

    Ranks with other experts need other bytes for the same adapter. Rank 0 decides for all of them,
    so it keeps account of their pages too, and only what fits everywhere is loaded.

    Not thread-safe, but for `layouts`: the engine's thread calls it between steps.
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
        pinned: PinnedMemory | None = None,
    ):
        """
        Args:
            pool_bytes: size of the buffer, rounded down to whole pages.
            dtype: of the factors in the pool; packs are cast to it when loaded.
            max_rank: adapters of a larger one are refused.
            rank_multiple: ranks are stored as multiples of this power of two.
            poison: overwrite freed blocks with NaN (tests).
            pinned: what this process has pinned so far; None: nothing.

        Raises:
            WorkerError: max_rank isn't from 1 to MAX_RANK.
        """
        if not 1 <= max_rank <= MAX_RANK:
            raise WorkerError(f"max_lora_rank must be from 1 to {MAX_RANK}, got {max_rank}")
        self._shard = shard
        self._poison = poison
        self._max_rank = max_rank
        self._blocks = PoolBlocks(shard, rank_multiple)
        ep_ranks = range(shard.ep) if shard.rank == 0 else (shard.ep_rank,)
        self._account = PoolAccount(self._blocks, pool_bytes, dtype.itemsize, ep_ranks)
        self.buffer = torch.zeros(
            self._account.total_bytes // dtype.itemsize, dtype=dtype, device=device
        )
        self.max_slots = max_slots
        self._tables = SlotTables(
            model, shard, self._blocks, self.buffer, max_slots,
            max_rank=self._blocks.stored(max_rank), rank_multiple=rank_multiple,
        )  # fmt: skip
        self.experts, self.dense = self._tables.experts, self._tables.dense
        self.pinned = pinned or PinnedMemory(device)
        self._loader = Loader(make_stager(self.buffer, self.pinned))
        self._loads: dict[int, Load] = {}  # of slots that aren't shown
        self._arriving: dict[int, Load] = {}  # of slots that are shown and may not be here
        # By itemsize and shape of a layer.
        self._pieces: dict[tuple[int, LayerBlocks], LayerPieces] = {}

    @property
    def total_bytes(self) -> int:
        return self._account.total_bytes

    @property
    def used_bytes(self) -> int:
        """On the fullest of the ranks that this one keeps account of."""
        return self._account.used_bytes

    def required_bytes(self, pack: Pack) -> int:
        """Bytes of pages that `pack` takes, resident, on the rank where it takes most."""
        return self.layouts(pack).nbytes

    def layouts(self, pack: Pack) -> Layouts:
        """Where the blocks of `pack` would lie. Any thread may call this.

        Raises:
            AdapterTooLarge: it can't be loaded even into the empty pool.
        """
        layouts = self._account.layouts(pack.layers)
        if layouts.max_rank > self._max_rank:
            raise AdapterTooLarge(
                f"adapter {pack.digest[:12]} has rank {layouts.max_rank}, at most {self._max_rank} "
                f"is served; raise max_lora_rank (up to {MAX_RANK})"
            )
        if layouts.nbytes > self.total_bytes:
            raise AdapterTooLarge(
                f"adapter {pack.digest[:12]} takes {layouts.nbytes} bytes, the pool has "
                f"{self.total_bytes}; raise pool_bytes"
            )
        return layouts

    def fits(self, layouts: Layouts, without: Iterable[int] = ()) -> bool:
        """Whether a pack could be loaded now if the slots of `without` were unloaded."""
        return self._account.fits(layouts, without)

    def load(self, slot: int, pack: Pack) -> int:
        """Makes `pack` resident as `slot`, and waits for it.

        Returns:
            Bytes of pages taken, as `required_bytes`.

        Raises:
            As `start_load`, and what goes wrong with the copies.
        """
        layouts = self.layouts(pack)
        load = self.start_load(slot, pack, layouts)
        try:
            load.wait()
        except BaseException:
            self.unload(slot)  # or the slot could never be loaded again
            raise
        self.show(slot)
        return layouts.nbytes

    def start_load(self, slot: int, pack: Pack, layouts: Layouts | None = None) -> Load:
        """Takes the pages of `pack` and has them filled in the background.

        The slot is in use from now on; one whose load fails is unloaded like any other.

        Args:
            layouts: those of `pack`, where they are known.

        Raises:
            PoolFull: it doesn't fit beside what is resident; nothing is taken.
            AdapterTooLarge: as `layouts`.
        """
        if self._account.has(slot):
            raise WorkerError(f"slot {slot} is in use")
        layouts = layouts or self.layouts(pack)
        runs = self._account.take(slot, layouts)
        if runs is None:
            raise PoolFull(
                f"adapter {pack.digest[:12]} takes {layouts.nbytes} bytes, "
                f"{self._account.free_bytes} are free"
            )
        load = Load(
            [(layer.index, _span_bytes(pack, layer)) for layer in pack.layers],
            lambda: self._contents(pack, layouts, runs),
            self._loader.stager.fence(),
        )
        self._loads[slot] = load
        self._loader.start(load)
        return load

    def show(self, slot: int) -> None:
        """Makes the tables name the adapter of `slot`, whose load was started before.

        Steps that run before it has come wait on the device, layer by layer (`await_layer`).

        Raises:
            What made the load fail.
        """
        load = self._loads.pop(slot)
        load.join_row()
        assert load.row is not None
        self._tables.write(slot, load.row)
        if not load.done:
            self._arriving[slot] = load

    def await_layer(self, layer: int | None = None) -> None:
        """Later launches of the current stream wait for what isn't here of the layer, or of all
        layers, of the slots that are shown."""
        for slot, load in list(self._arriving.items()):
            if load.done:
                del self._arriving[slot]
            else:
                load.join(layer)

    def unload(self, slot: int) -> None:
        """Frees `slot`: its table entries say 'absent' before its pages can be taken again."""
        for loads in (self._loads, self._arriving):
            if (load := loads.pop(slot, None)) is not None:
                load.cancel()
        self._tables.clear(slot)
        runs = self._account.release(slot)
        if self._poison:
            page = self._account.page
            for first, pages in runs[self._shard.ep_rank]:
                self.buffer[first * page : (first + pages) * page] = float("nan")

    def warm_up(self) -> None:
        """Compiles what loads launch."""
        self._loader.stager.warm_up()

    def _of(self, layer: PackLayer) -> LayerBlocks:
        return self._blocks.blocks(layer, self._shard.ep_rank)

    def _contents(self, pack: Pack, layouts: Layouts, runs: Mapping[int, list[Run]]) -> Contents:
        """Called in the loader's thread."""
        mine = self._shard.ep_rank
        starts = np.array([first * self._account.page for first, _ in runs[mine]], np.int64)
        run, offset = layouts.of_rank[mine].places.T
        places = starts[run] + offset if run.size else offset
        layers, at = [], 0
        for layer in pack.layers:
            blocks = self._of(layer)
            end = at + blocks.elements.size
            layers.append((layer, blocks, places[at:end]))
            at = end
            # What can be wrong with a pack is found before a byte is moved.
            self._layer_pieces(pack, layer, blocks)
        pinned = self.pinned.holds_pack(pack)
        return Contents(lambda: self._tables.row(layers), self._transfers(pack, layers), pinned)

    def _transfers(
        self, pack: Pack, layers: Sequence[tuple[PackLayer, LayerBlocks, np.ndarray]]
    ) -> Iterator[Transfer]:
        dtype, aligned = _DTYPES[pack.dtype], self._blocks.align(self.buffer.itemsize) % 8 == 0
        for layer, blocks, places in layers:
            pieces = self._layer_pieces(pack, layer, blocks)
            table = pieces.table.copy()
            table[:, 1] += places[pieces.block]
            low, high = pack.layer_span(layer)
            for stage in pieces.stages:
                yield Transfer(
                    pack.memory[low:high],
                    stage.copies,
                    stage.nbytes,
                    dtype,
                    table[stage.low : stage.high],
                    pieces.flat and aligned,
                    layer.index if stage is pieces.stages[-1] else None,
                )

    def _layer_pieces(self, pack: Pack, layer: PackLayer, blocks: LayerBlocks) -> LayerPieces:
        itemsize = _DTYPES[pack.dtype].itemsize
        key = itemsize, blocks
        pieces = self._pieces.get(key)
        if pieces is None:
            shard = self._shard
            chunks = Chunks.of(
                shard.model.moe_intermediate_size, pack.chunks, shard.expert_tp_rank,
                shard.expert_tp,
            )  # fmt: skip
            room = self._loader.stager.room
            pieces = layer_pieces(blocks, pack.spans(layer), itemsize, chunks, room)
            if len(self._pieces) >= _MOST_PIECES:
                self._pieces.clear()
            self._pieces[key] = pieces
        return pieces


def _span_bytes(pack: Pack, layer: PackLayer) -> int:
    low, high = pack.layer_span(layer)
    return high - low
