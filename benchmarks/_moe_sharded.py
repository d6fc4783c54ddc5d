"""LoRA of a rank that has a cut of every expert ("expert-TP"), with no factor held twice.

A cut of the experts along I cuts B13 and A2 with it. A13 and B2 have H instead, and are either
replicated, which needs no more exchange than the base layer, or cut along H as here ("fully
sharded", after S-LoRA, arXiv 2311.03285): what a rank shrinks is then a part of a sum that all
ranks need before they expand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from _moe_inputs import Shape
from loraplex.kernels import ExpertLoraTables, MoeWeights
from loraplex.kernels.gpu.fused import FusedBackend
from loraplex.kernels.gpu.hooked import GpuBatch, check_tables
from loraplex.kernels.gpu.lora import Shrunk, expand_, shrink_down
from loraplex.kernels.runner import Hooks, MoeRunner

Exchange = Callable[[torch.Tensor], object]  # adds up a tensor over the ranks, in place


@dataclass(frozen=True)
class ShardedShape(Shape):
    """A rank's share whose A13 and B2 are cut in `ranks` along H."""

    ranks: int = 1

    @classmethod
    def of(cls, whole: Shape, ranks: int) -> ShardedShape:
        share = whole.share(f"tp{ranks}")
        if share.hidden % ranks:
            raise ValueError(f"hidden {share.hidden} isn't a multiple of {ranks}")
        return cls(**vars(share), ranks=ranks)

    @property
    def replicated(self) -> Shape:
        """The share whose A13 and B2 are whole."""
        return Shape(**{name: value for name, value in vars(self).items() if name != "ranks"})

    def factor_elements(self, rank: int) -> tuple[int, int, int, int]:
        a13, b13, a2, b2 = super().factor_elements(rank)
        return a13 // self.ranks, b13, a2, b2 // self.ranks


@dataclass(frozen=True)
class FullySharded(FusedBackend):
    """The fused backend with factors of a `ShardedShape`. Down's expand covers a part of the
    columns only, so it is a pass of its own."""

    rank: int = 0
    ranks: int = 1
    exchange: Exchange = lambda s: None

    def _mine(self, hidden: int) -> slice:
        size = hidden // self.ranks
        return slice(self.rank * size, (self.rank + 1) * size)

    def shrunk(
        self, x: torch.Tensor, intermediate: int, batch: GpuBatch, lora: ExpertLoraTables
    ) -> Shrunk:
        shrunk = super().shrunk(x[:, self._mine(x.shape[1])], intermediate, batch, lora)
        self.exchange(shrunk.s)
        return shrunk

    def second_half(
        self,
        a: torch.Tensor,
        weights: MoeWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        batch: GpuBatch,
        lora: ExpertLoraTables | None,
        hooks: Hooks,
    ) -> torch.Tensor:
        if lora is None:
            return super().second_half(a, weights, topk_weights, topk_ids, batch, lora, hooks)
        check_tables(lora, batch.rows, a.device)
        y = self.down(a, weights, batch)
        shrunk = shrink_down(a, batch.rows, lora, batch.tiles.shrink_down)
        self.exchange(shrunk.s)
        mine = y[:, self._mine(y.shape[1])]
        expand_(mine, shrunk, batch.rows, (mine.shape[1],), by_token=False)
        return self.combine(y, topk_weights, topk_ids, batch)


def runner(rank: int, ranks: int, exchange: Exchange) -> MoeRunner:
    return MoeRunner(FullySharded(rank=rank, ranks=ranks, exchange=exchange))


def as_replicated(
    tables: ExpertLoraTables, shape: ShardedShape, lora_rank: int, rank: int
) -> ExpertLoraTables:
    """The same adapters for a layer that isn't fully sharded: A13 and B2 are zero outside of what
    `rank` holds. Without an exchange, such a layer's output is this rank's."""
    sizes = shape.factor_elements(lora_rank)
    wide = shape.replicated.factor_elements(lora_rank)
    count = tables.offset_a13.numel()
    size, cut = shape.hidden, shape.hidden // shape.ranks
    mine = slice(rank * cut, (rank + 1) * cut)
    pool = tables.pool.new_zeros(count, sum(wide))
    starts = [sum(wide[:i]) for i in range(4)]
    names = ("offset_a13", "offset_b13", "offset_a2", "offset_b2")
    for name, start, small, large in zip(names, starts, sizes, wide, strict=True):
        for block, place in zip(pool, getattr(tables, name).flatten().tolist(), strict=True):
            found, into = tables.pool[place : place + small], block[start : start + large]
            if name == "offset_a13":  # [2 * rank, H]
                into.view(-1, size)[:, mine] = found.view(-1, cut)
            elif name == "offset_b2":  # [H, rank]
                into.view(size, lora_rank)[mine] = found.view(cut, lora_rank)
            else:
                into.copy_(found)
    at = torch.arange(count, device=pool.device).view_as(tables.offset_a13) * sum(wide)
    offsets = {name: at + start for name, start in zip(names, starts, strict=True)}
    return replace(tables, pool=pool.flatten(), **offsets)
