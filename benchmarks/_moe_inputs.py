"""What benchmarks/moe_lora.py runs on: shapes, routing, weights and adapters, all random."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from loraplex.kernels import FP8, FP8_BLOCK, ExpertLoraTables, MoeWeights, fp8_blocks

WEIGHT_STD = 0.02
# With x and weights as here, an adapter changes gate, up and down by half of the base's size.
LORA_SCALE, LORA_B_STD = 2.0, 0.25  # B's entries have LORA_B_STD / sqrt(rank)
FILLED_SLOTS = 64
_ALIGNMENT = 8  # elements: 16 bytes
_TABLE_OFFSETS = ("offset_a13", "offset_b13", "offset_a2", "offset_b2")


@dataclass(frozen=True)
class Shape:
    """One model's experts, or a rank's share of them."""

    name: str
    hidden: int
    intermediate: int  # of this rank
    experts: int  # of this rank
    top_k: int
    all_experts: int  # of all ranks: what the router chooses from
    parallel: str = "none"
    fp8: bool = False  # base weights in FP8

    @classmethod
    def whole(cls, name: str, hidden: int, intermediate: int, experts: int, top_k: int) -> Shape:
        return cls(name, hidden, intermediate, experts, top_k, experts)

    def share(self, parallel: str) -> Shape:
        """Rank 0's share: "tp4" cuts every expert in 4, "ep4" leaves a quarter of the experts."""
        ranks = int(parallel[2:])
        kind = {"tp": "intermediate", "ep": "experts"}[parallel[:2]]
        size, rest = divmod(getattr(self, kind), ranks)
        if rest:
            raise ValueError(
                f"{parallel}: {kind} {size * ranks + rest} isn't a multiple of {ranks}"
            )
        return replace(self, parallel=parallel, **{kind: size})

    @property
    def expert_elements(self) -> int:
        """Elements of one expert's w13 and w2."""
        return 3 * self.hidden * self.intermediate

    def expert_bytes(self, element: int) -> float:
        """Of one expert's w13 and w2, whose elements have `element` bytes where they aren't FP8."""
        if self.fp8:
            return self.expert_elements * (1 + 4 / FP8_BLOCK**2)
        return self.expert_elements * element

    @property
    def possible(self) -> bool:
        """Whether no block of FP8 weights holds both gate and up rows."""
        return not self.fp8 or self.intermediate % FP8_BLOCK == 0

    def factor_elements(self, rank: int) -> tuple[int, int, int, int]:
        """Elements of one (slot, expert)'s A13, B13, A2 and B2."""
        hidden, inner = self.hidden, self.intermediate
        return 2 * rank * hidden, 2 * inner * rank, inner * rank, hidden * rank

    def active_experts(self, tokens: int) -> float:
        """Expected number of this rank's experts that `tokens` tokens choose."""
        return self.experts * (1 - (1 - self.top_k / self.all_experts) ** tokens)

    def __str__(self) -> str:
        share = "" if self.parallel == "none" else f", {self.parallel} rank"
        fp8 = ", FP8 weights" if self.fp8 else ""
        return (
            f"{self.name}{share}{fp8}: hidden {self.hidden}, intermediate {self.intermediate}, "
            f"{self.experts} experts, top {self.top_k} of {self.all_experts}"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape.whole("qwen3-30b", 2048, 768, 128, 8),
        Shape.whole("olmoe", 2048, 1024, 64, 8),
        Shape.whole("mixtral-8x7b", 4096, 14336, 8, 2),
        Shape.whole("qwen3-235b-tp4", 4096, 384, 128, 8),
        Shape.whole("qwen3-235b-tp8", 4096, 192, 128, 8),
        Shape.whole("deepseek-v2-lite", 2048, 1408, 64, 6),
    )
}
MAIN_SHAPE, RANK = "qwen3-30b", 16  # of the published bars and the default rows
SMOKE_SHAPE = Shape.whole("smoke", 64, 32, 8, 2)
SMOKE_FP8_SHAPE = Shape.whole("smoke", 192, 256, 8, 2)


@dataclass(frozen=True)
class Routing:
    """Experts of each token, and the run of slots that the tokens' adapters take."""

    weights: torch.Tensor  # float32 [T, K]
    ids: torch.Tensor  # int32 [T, K], -1 = not on this rank
    slot: torch.Tensor  # int32 [T], from 0, ordered

    def to(self, device: torch.device) -> Routing:
        return Routing(self.weights.to(device), self.ids.to(device), self.slot.to(device))


def make_routing(shape: Shape, tokens: int, adapters: int, index: int) -> Routing:
    """Uniformly random routing on the CPU, the same for an index on any machine and row."""
    generator = torch.Generator().manual_seed(1_000_003 * tokens + index)
    logits = torch.randn(tokens, shape.all_experts, generator=generator)
    weights, ids = logits.softmax(1).topk(shape.top_k)
    ids[ids >= shape.experts] = -1
    slot = torch.arange(tokens) * adapters // tokens
    return Routing(weights, ids.int(), slot.int())


def make_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> MoeWeights:
    """In `dtype` or in FP8."""
    hidden, inner = shape.hidden, shape.intermediate
    w13, w2 = (
        torch.empty(shape.experts, 2 * inner, hidden, dtype=dtype, device=device).normal_(
            0, WEIGHT_STD
        ),
        torch.empty(shape.experts, hidden, inner, dtype=dtype, device=device).normal_(
            0, WEIGHT_STD
        ),
    )
    if not shape.fp8:
        return MoeWeights(w13, w2)
    scale13, scale2 = (
        WEIGHT_STD * (0.5 + torch.rand(w.shape[0], *map(fp8_blocks, w.shape[1:]), device=device))
        for w in (w13, w2)
    )
    codes = [w.div_(WEIGHT_STD).to(FP8) for w in (w13, w2)]
    return MoeWeights(codes[0], codes[1], w13_scale=scale13, w2_scale=scale2)


def make_tables(
    shape: Shape, rank: int, dtype: torch.dtype, device: torch.device
) -> ExpertLoraTables:
    """FILLED_SLOTS adapters with factors of their own for every expert.

    The four factors of one (slot, expert) stand together; where is drawn anew for each.
    """
    sizes = shape.factor_elements(rank)
    starts, page = [], 0
    for size in sizes:
        starts.append(page)
        page += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
    count = FILLED_SLOTS * shape.experts
    pool = torch.empty(count * page, dtype=dtype, device=device).normal_(0, WEIGHT_STD)
    for index in (1, 3):  # B13 and B2
        b = pool.view(count, page)[:, starts[index] : starts[index] + sizes[index]]
        b.mul_(LORA_B_STD / rank**0.5 / WEIGHT_STD)
    first = (torch.randperm(count, device=device) * page).view(FILLED_SLOTS, shape.experts)
    of_each = (FILLED_SLOTS, shape.experts, 3)
    return ExpertLoraTables(
        pool=pool,
        **{name: first + start for name, start in zip(_TABLE_OFFSETS, starts, strict=True)},
        rank=torch.full(of_each, rank, dtype=torch.int32, device=device),
        scale=torch.full(of_each, LORA_SCALE, device=device),
        layout=torch.zeros(FILLED_SLOTS, dtype=torch.int32, device=device),
        max_rank=rank,
        rank_multiple=math.gcd(rank, _ALIGNMENT),
    )


def with_slots(
    tables: ExpertLoraTables, slots: int | None, adapters: int, first_slot: int
) -> tuple[ExpertLoraTables, int]:
    """The same pool behind tables of `slots` slots; None = of the active ones alone.

    Args:
        first_slot: slot of the first active adapter in `tables`.

    Returns:
        The tables, and the slot of the first active adapter in them.
    """

    def resized(table: torch.Tensor, empty: int) -> torch.Tensor:
        if slots is None:
            return table[first_slot : first_slot + adapters].clone()
        rest = (max(slots - table.shape[0], 0), *table.shape[1:])
        return torch.cat((table[:slots], table.new_full(rest, empty)))

    changed = {name: resized(getattr(tables, name), -1) for name in _TABLE_OFFSETS}
    changed |= {name: resized(getattr(tables, name), 0) for name in ("rank", "scale", "layout")}
    return replace(tables, **changed), 0 if slots is None else first_slot
