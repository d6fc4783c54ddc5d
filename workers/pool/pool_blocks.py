"""The blocks that a pack's factors make in the pool of a rank: their sizes, homes and contents.

Sizes follow from the pack's header alone. All blocks of a kind in a layer are described at once, as
arrays: a large adapter has 30,000. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...adapter_store import DenseEntry, ExpertEntry, LayerSpans, PackLayer, Span
from ..shard import Shard
from .dense_groups import DenseGroup, dense_groups

EXPERTS = "experts"
_ALIGN_BYTES = 16
_MOST_SHAPES = 64  # of layers, that are kept; the layers of an adapter mostly have one


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor, in each of a group's n blocks. Arrays are int64 [n].

    Attributes:
        shift: elements of the block before them.
        rows: how many. With `chunked`, of all of the rank's chunks.
        columns: of the tensor; 0: there is no tensor, these are zeros.
        stored: columns in the pool; those behind the tensor's are zeros.
        first_row: of the tensor.
        spans: the tensors of a pack's layer, in the order of the blocks.
        chunked: the tensor is one chunk's, and others like it lie in the others.
    """

    shift: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    stored: np.ndarray
    first_row: np.ndarray
    spans: Callable[[LayerSpans], Sequence[Span]] | None = None
    chunked: bool = False


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one kind in a layer.

    Attributes:
        group: whose table names them: a group of `dense_groups`, or EXPERTS.
        factor: which table: "a" or "b"; of EXPERTS "a13", "b13", "a2" or "b2".
        entries: int64 [n], of the table: the projection in the group, or the expert's number on
            the rank.
        elements: int64 [n], how many each has.
        parts: what fills them.
    """

    group: str
    factor: str
    entries: np.ndarray
    elements: np.ndarray
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class LayerBlocks:
    """What a rank holds of a layer. Layers of one shape have one of these.

    Attributes:
        held: positions in the pack of the experts that the rank holds. local: their numbers on
            the rank. Both int64 [n]. ranks: int32 [n, 3], as the pool stores them.
        max_rank: the largest of the layer, on all ranks.
    """

    groups: tuple[BlockGroup, ...]
    held: np.ndarray
    local: np.ndarray
    ranks: np.ndarray
    max_rank: int

    @cached_property
    def elements(self) -> np.ndarray:
        """int64, of each block of all groups."""
        return np.concatenate([np.zeros(0, np.int64), *(g.elements for g in self.groups)])


class PoolBlocks:
    """What a rank of `shard` stores of any pack. Several threads may call."""

    def __init__(self, shard: Shard, rank_multiple: int = 1):
        """
        Args:
            rank_multiple: ranks are stored as multiples of this power of two.
        """
        self._shard, self._multiple = shard, rank_multiple
        self._known: dict[Any, LayerBlocks] = {}

    def stored(self, rank: Any) -> Any:
        """The rank that the pool holds in place of `rank`; or an array of them."""
        return -(-rank // self._multiple) * self._multiple

    def align(self, itemsize: int) -> int:
        """Elements of `itemsize` bytes of which every block begins at a multiple."""
        return max(_ALIGN_BYTES // itemsize, self._multiple)  # both are powers of two

    def sizes(self, layers: Sequence[PackLayer], ep_rank: int, itemsize: int) -> np.ndarray:
        """Elements that every block takes, each aligned.

        Args:
            itemsize: bytes of an element.
        """
        align = self.align(itemsize)
        elements = [np.zeros(0, np.int64)]
        elements += [self.blocks(layer, ep_rank).elements for layer in layers]
        return -(-np.concatenate(elements) // align) * align

    def blocks(self, layer: PackLayer, ep_rank: int) -> LayerBlocks:
        """Of the experts of other ranks than this one, good for sizes only."""
        key = (self.shape(layer), ep_rank)
        blocks = self._known.get(key)
        if blocks is None:
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            blocks = self._known[key] = self._make(layer, ep_rank)
        return blocks

    def shape(self, layer: PackLayer) -> Any:
        """Equal of layers whose blocks are."""
        x = layer.experts
        return (
            layer.index >= self._shard.model.dense_layers,
            tuple((name, e.rank, e.in_, e.out) for name, e in layer.dense.items()),
            x and (x.ids, x.rank, x.fused_gate_up, x.shared_a13, x.shared_b2),
        )

    def _make(self, layer: PackLayer, ep_rank: int) -> LayerBlocks:
        groups: list[BlockGroup] = []
        for name, group in dense_groups(self._shard, layer.index).items():
            for p, target in enumerate(group.targets):
                if (entry := layer.dense.get(target)) is not None:
                    groups += self._dense(name, group, p, entry)
        ranks = [entry.rank for entry in layer.dense.values()]
        held = local = np.zeros(0, np.int64)
        stored = np.zeros((0, 3), np.int32)
        if (experts := layer.experts) is not None:
            mine = self._shard.experts_of(ep_rank)
            ids = np.array(experts.ids, np.int64)
            held = np.flatnonzero((ids >= mine.start) & (ids < mine.stop))
            local = ids[held] - mine.start
            stored = self.stored(np.array(experts.rank, np.int32).reshape(-1, 3)[held])
            groups += self._experts(experts, held, local)
            ranks += [max(map(max, experts.rank), default=0)]
        groups = [g for g in groups if g.entries.size]
        return LayerBlocks(tuple(groups), held, local, stored, max(ranks, default=0))

    def _dense(
        self, name: str, group: DenseGroup, p: int, entry: DenseEntry
    ) -> Iterator[BlockGroup]:
        target, rank = group.targets[p], entry.rank
        low, high = self._shard.rows(target)
        if group.input_cut:  # A is stored transposed, and this rank has some of its rows
            a = self._wide(high - low, rank, low, lambda s: [s.dense_a[target]])
            b = self._wide(entry.out, rank, 0, lambda s: [s.dense_b[target]])
        else:
            a = self._tall(entry.in_, [_one(rank)], lambda s: [s.dense_a[target]])
            b = self._wide(high - low, rank, low, lambda s: [s.dense_b[target]])
        yield _group(name, "a", _one(p), a)
        yield _group(name, "b", _one(p), b)

    def _experts(
        self, experts: ExpertEntry, held: np.ndarray, local: np.ndarray
    ) -> Iterator[BlockGroup]:
        """Of the experts at `held`; the first one's carry what all share."""
        hidden, inter = self._shard.model.hidden_size, self._shard.intermediate
        gate, up, down = np.array(experts.rank, np.int64).reshape(-1, 3)[held].T

        def where(which: np.ndarray, keep: np.ndarray) -> list[int]:
            return which[keep].tolist()

        first = np.arange(held.size) == 0
        a_ranks = [gate] if experts.fused_gate_up else [gate, up]
        keep = (sum(a_ranks) > 0) & (first | (not experts.shared_a13))
        at = [0] * int(keep.sum()) if experts.shared_a13 else where(held, keep)
        a13 = self._tall(hidden, [r[keep] for r in a_ranks], lambda s: [s.a13[i] for i in at])
        yield _group(EXPERTS, "a13", local[keep], a13)

        keep = gate + up > 0
        in_chunks = where(held, keep)
        gates = self._wide(
            inter, gate[keep], 0, lambda s: [s.chunk[i].gate for i in in_chunks], chunked=True
        )
        ups = self._wide(
            inter, up[keep], 0, lambda s: [s.chunk[i].up for i in in_chunks],
            shift=inter * self.stored(gate[keep]), chunked=True,
        )  # fmt: skip
        yield _group(EXPERTS, "b13", local[keep], gates + ups)

        keep = down > 0
        downs = where(held, keep)
        a2 = self._wide(
            inter, down[keep], 0, lambda s: [s.chunk[i].a2 for i in downs], chunked=True
        )
        yield _group(EXPERTS, "a2", local[keep], a2)
        keep &= first | (not experts.shared_b2)
        b2_at = [0] * int(keep.sum()) if experts.shared_b2 else where(held, keep)
        b2 = self._wide(hidden, down[keep], 0, lambda s: [s.b2[i] for i in b2_at])
        yield _group(EXPERTS, "b2", local[keep], b2)

    def _wide(
        self,
        rows: int,
        rank: Any,
        first_row: int,
        spans: Callable[[LayerSpans], Sequence[Span]],
        shift: Any = 0,
        chunked: bool = False,
    ) -> list[Part]:
        """[rows, rank], whose columns are made up to the stored rank."""
        rank = np.atleast_1d(np.asarray(rank, np.int64))
        like = np.zeros_like(rank)
        return [
            Part(
                like + shift, like + rows, rank, self.stored(rank), like + first_row, spans, chunked
            )
        ]

    def _tall(
        self,
        columns: int,
        ranks: Sequence[np.ndarray],
        spans: Callable[[LayerSpans], Sequence[Span]],
    ) -> list[Part]:
        """[ranks, columns], the rows of each rank made up to the stored one."""
        parts, like = [], np.zeros_like(ranks[0])
        first_row = shift = like
        for rank in ranks:
            stored = self.stored(rank)
            wide = like + columns
            parts.append(Part(shift, rank, wide, wide, first_row, spans))
            parts.append(Part(shift + rank * columns, stored - rank, like, wide, like))
            first_row, shift = first_row + rank, shift + stored * columns
        return parts


def _group(group: str, factor: str, entries: np.ndarray, parts: list[Part]) -> BlockGroup:
    elements = sum((part.rows * part.stored for part in parts), np.zeros_like(entries))
    return BlockGroup(group, factor, entries, elements, tuple(parts))


def _one(n: int) -> np.ndarray:
    return np.array([n], np.int64)
