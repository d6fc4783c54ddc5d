"""Which pages of the adapter pool each resident adapter holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...adapter_store import PackLayer
from .pool_blocks import PoolBlocks
from .pool_pages import BlockLayout, Pages

_MIN_PAGE, _MAX_PAGE = 16 << 10, 2 << 20

Run = tuple[int, int]  # first page, pages


def page_bytes(pool_bytes: int) -> int:
    """About 1/256 of the pool, a power of two between 16 KiB and 2 MiB."""
    page = 1 << max(0, (pool_bytes // 256)).bit_length()
    return min(max(page, _MIN_PAGE), _MAX_PAGE)


@dataclass(frozen=True)
class Layouts:
    """Where a pack's blocks lie in its pages, by ep rank.

    Attributes:
        nbytes: of its pages, on the rank where they are most.
        max_rank: the largest of its factors.
    """

    of_rank: Mapping[int, BlockLayout]
    nbytes: int
    max_rank: int


class PoolAccount:
    """The pages of one or more ranks' pools, handed out to slots.

    Ranks with other experts need other bytes for the same adapter: a slot gets its pages on all of
    the ranks of this account, or on none.
    """

    def __init__(self, blocks: PoolBlocks, pool_bytes: int, itemsize: int, ep_ranks: Iterable[int]):
        """
        Args:
            pool_bytes: of each rank's pool, rounded down to whole pages.
            itemsize: bytes of an element.
            ep_ranks: the ranks to keep account of, one of each ep group.
        """
        self.page_bytes = page_bytes(pool_bytes)
        self.page = self.page_bytes // itemsize  # elements
        self._blocks, self._itemsize = blocks, itemsize
        self._pages = {ep_rank: Pages(pool_bytes // self.page_bytes) for ep_rank in ep_ranks}
        self._runs: dict[int, dict[int, list[Run]]] = {}  # slot -> ep rank -> runs

    @property
    def total_bytes(self) -> int:
        return next(iter(self._pages.values())).total * self.page_bytes

    @property
    def free_bytes(self) -> int:
        """On the fullest of the ranks."""
        return min(pages.free for pages in self._pages.values()) * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """On the fullest of the ranks."""
        return self.total_bytes - self.free_bytes

    def layouts(self, layers: Sequence[PackLayer]) -> Layouts:
        """Of a pack of these layers."""
        of_rank = {
            r: BlockLayout(self._blocks.sizes(layers, r, self._itemsize), self.page)
            for r in self._pages
        }
        nbytes = max(each.pages for each in of_rank.values()) * self.page_bytes
        any_rank = next(iter(self._pages))
        max_rank = max((self._blocks.blocks(x, any_rank).max_rank for x in layers), default=0)
        return Layouts(of_rank, nbytes, max_rank)

    def has(self, slot: int) -> bool:
        """Whether `slot` holds pages, be it none."""
        return slot in self._runs

    def fits(self, layouts: Layouts, without: Iterable[int] = ()) -> bool:
        """Whether `take` would find room once the slots of `without` are released."""
        gone = [self._runs[slot] for slot in without]
        for ep_rank, layout in layouts.of_rank.items():
            pages = self._pages[ep_rank].copy()
            for first, n in (run for runs in gone for run in runs[ep_rank]):
                pages.release(first, n)
            if pages.allocate(layout.runs) is None:
                return False
        return True

    def take(self, slot: int, layouts: Layouts) -> dict[int, list[Run]] | None:
        """Gives `slot` its pages.

        Returns:
            By ep rank, a run for each of the layout's; None, and nothing taken, unless all of the
            ranks have room.
        """
        runs: dict[int, list[Run]] = {}
        for ep_rank, layout in layouts.of_rank.items():
            starts = self._pages[ep_rank].allocate(layout.runs)
            if starts is None:
                self._give_back(runs)
                return None
            runs[ep_rank] = list(zip(starts, layout.runs, strict=True))
        self._runs[slot] = runs
        return runs

    def release(self, slot: int) -> dict[int, list[Run]]:
        """Takes the pages of `slot` back; returns what they were, as `take`."""
        runs = self._runs.pop(slot)
        self._give_back(runs)
        return runs

    def _give_back(self, runs: Mapping[int, list[Run]]) -> None:
        for ep_rank, mine in runs.items():
            for first, pages in mine:
                self._pages[ep_rank].release(first, pages)
