"""The blocks that a pack's factors make in the pool of a rank: their sizes, homes and contents.

Sizes follow from the pack's header alone. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...adapter_store import DenseEntry, ExpertEntry, Pack, PackLayer
from ..shard import Shard
from .dense_groups import DenseGroup, dense_groups

EXPERTS = "experts"
_ALIGN_BYTES = 16


@dataclass
class Block:
    """One tensor to place.

    Attributes:
        layer, group: whose table names it: a group of `dense_groups`, or EXPERTS.
        factor: which table: "a" or "b"; of EXPERTS "a13", "b13", "a2" or "b2".
        entry: of the table: the projection in the group, or the expert's number on the rank.
        elements: how many.
        read: takes them out of the pack, as they are to be stored.
        shift: elements before it in a block of several parts; only shift 0 sets the table.
    """

    layer: int
    group: str
    factor: str
    entry: int
    elements: int
    read: Callable[[Pack], np.ndarray]
    shift: int = 0


class PoolBlocks:
    """What a rank of `shard` stores of any pack."""

    def __init__(self, shard: Shard, rank_multiple: int = 1):
        """
        Args:
            rank_multiple: ranks are stored as multiples of this power of two.
        """
        self._shard, self._multiple = shard, rank_multiple

    def stored(self, rank: int) -> int:
        """The rank that the pool holds in place of `rank`."""
        return -(-rank // self._multiple) * self._multiple

    def sizes(self, layers: Sequence[PackLayer], ep_rank: int, itemsize: int) -> list[int]:
        """Elements that every block takes, parts added up, each aligned.

        Args:
            itemsize: bytes of an element.
        """
        # Both are powers of two.
        align = max(_ALIGN_BYTES // itemsize, self._multiple)
        sizes: list[int] = []
        for block in self.blocks(layers, ep_rank):
            if block.shift == 0:
                sizes.append(0)
            sizes[-1] = -(-(block.shift + block.elements) // align) * align
        return sizes

    def blocks(self, layers: Sequence[PackLayer], ep_rank: int) -> Iterator[Block]:
        """Every tensor of a pack of `layers` that a rank of `ep_rank` holds, parts of one block
        right after another. Those of other experts than this rank's are good for their sizes
        only."""
        for layer in layers:
            for name, group in dense_groups(self._shard, layer.index).items():
                for p, target in enumerate(group.targets):
                    if (entry := layer.dense.get(target)) is not None:
                        yield from self._dense_blocks(layer.index, name, group, p, entry)
            if layer.experts is None:
                continue
            for nth, (i, local) in enumerate(self.held(layer.experts, ep_rank)):
                yield from self._expert_blocks(layer.index, i, local, layer.experts, nth == 0)

    def held(self, experts: ExpertEntry, ep_rank: int) -> list[tuple[int, int]]:
        """Position in the pack and number on the rank, of the experts that `ep_rank` holds."""
        held = self._shard.experts_of(ep_rank)
        return [(i, e - held.start) for i, e in enumerate(experts.ids) if e in held]

    def _dense_blocks(
        self, layer: int, name: str, group: DenseGroup, p: int, entry: DenseEntry
    ) -> Iterator[Block]:
        target, stored = group.targets[p], self.stored(entry.rank)
        low, high = rows = self._shard.rows(target)
        if group.input_cut:  # A is stored transposed, and this rank has some of its rows
            a_size, b_size, axis, a_rows, b_rows = high - low, entry.out, 1, rows, None
        else:
            a_size, b_size, axis, a_rows, b_rows = entry.in_, high - low, 0, None, rows
        yield Block(
            layer, name, "a", p, a_size * stored,
            lambda pack: padded(pack.dense_a(layer, target, rows=a_rows), axis, stored),
        )  # fmt: skip
        yield Block(
            layer, name, "b", p, b_size * stored,
            lambda pack: padded(pack.dense_b(layer, target, rows=b_rows), 1, stored),
        )  # fmt: skip

    def _expert_blocks(
        self, layer: int, i: int, local: int, experts: ExpertEntry, first: bool
    ) -> Iterator[Block]:
        """Of one expert; the first one's carry what all share."""
        tp = (self._shard.expert_tp_rank, self._shard.expert_tp)
        hidden, inter = self._shard.model.hidden_size, self._shard.intermediate
        gate, up, down = experts.rank[i]

        def block(
            factor: str, elements: int, read: Callable[[Pack], np.ndarray], shift: int = 0
        ) -> Block:
            return Block(layer, EXPERTS, factor, local, elements, read, shift)

        a_ranks = (gate,) if experts.fused_gate_up else (gate, up)
        a_rows = sum(map(self.stored, a_ranks))
        if a_rows and (first or not experts.shared_a13):
            yield block(
                "a13", a_rows * hidden, lambda pack: self._padded_parts(pack.a13(layer, i), a_ranks)
            )
        shift = 0
        parts: tuple[tuple[Literal["gate", "up"], int], ...] = (
            ("gate", self.stored(gate)),
            ("up", self.stored(up)),
        )
        for part, rank in parts:
            if rank:
                yield block(
                    "b13",
                    inter * rank,
                    lambda pack, part=part, rank=rank: padded(
                        pack.b13(layer, i, part, *tp), 1, rank
                    ),
                    shift,
                )
                shift += inter * rank
        if down:
            columns = self.stored(down)
            yield block(
                "a2", inter * columns, lambda pack: padded(pack.a2(layer, i, *tp), 1, columns)
            )
            if first or not experts.shared_b2:
                yield block(
                    "b2", hidden * columns, lambda pack: padded(pack.b2(layer, i), 1, columns)
                )

    def _padded_parts(self, a: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
        """`a` [sum(ranks), H] with the rows of each part made up to its stored rank."""
        if all(self.stored(rank) == rank for rank in ranks):
            return a
        ends = np.cumsum(ranks)
        rows = [a[end - rank : end] for end, rank in zip(ends, ranks, strict=True)]
        return np.concatenate([padded(part, 0, self.stored(len(part))) for part in rows])


def padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """`array`, 2-D, with zeros behind it up to `size` along `axis`; itself where it has that."""
    if array.shape[axis] == size:
        return array
    rows, columns = array.shape
    result = np.zeros((size, columns) if axis == 0 else (rows, size), array.dtype)
    result[:rows, :columns] = array
    return result
