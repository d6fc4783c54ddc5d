"""Layers on a GPU, of sizes that the grid of cases asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import pytest
import torch
from loraplex.kernels import (
    FUSED_GATE_UP,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
    LoraBatch,
)
from triton import knobs

from ..kernels.cases import Layer

# What a module of these tests is marked with.
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and knobs.runtime.interpret,
        reason="kernels are to be compiled: unset TRITON_INTERPRET",
    ),
]
DEVICE = torch.device("cuda")
HIDDEN, INTERMEDIATE = 512, 256

# Relative Frobenius error of what LoRA adds, against float32 on the same inputs.
LORA_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}

POOL_ELEMENTS = 1 << 25
FACTOR_SIZE = 0.1  # standard deviation of the pool's elements
# Blocks lie anywhere in the pool, over each other too: nothing writes them, and wrong ones differ.
LAYOUTS = (0, FUSED_GATE_UP, SHARED_B2, FUSED_GATE_UP | SHARED_A13)


@dataclass(frozen=True)
class Case:
    """One batch: its sizes, and what its adapters are like."""

    tokens: int
    top_k: int
    experts: int
    adapters: int
    rank: int  # of every other adapter; the rest have half of it
    dtype: torch.dtype
    skipped: float = 0.0  # share of the pairs that are on other ranks
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T{self.tokens}-K{self.top_k}-E{self.experts}-A{self.adapters}-R{self.rank}-{dtype}"


def random_layer(case: Case, seed: int = 0) -> Layer:
    """Layers of one case have tables of one shape and a pool of one size."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=DEVICE)
        return (values * size).to(case.dtype)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=DEVICE)

    hidden, intermediate = case.hidden, case.intermediate
    # Some experts are chosen more often than others.
    scores = uniform(case.tokens, case.experts) + 0.5 * uniform(case.experts)
    ids = scores.argsort(1, descending=True)[:, : case.top_k].int()
    skipped = uniform(*ids.shape) < case.skipped
    skipped[0, 0] = False
    ids[skipped] = -1
    weights = uniform(*ids.shape) + 0.1
    # A fifth of the tokens is the base model's, but never the only token.
    token_slot = (uniform(case.tokens) * case.adapters).int().clamp(max=case.adapters - 1)
    token_slot[1:][uniform(case.tokens - 1) < 0.2] = -1
    return Layer(
        x=normal(case.tokens, hidden),
        w13=normal(case.experts, 2 * intermediate, hidden, size=hidden**-0.5),
        w2=normal(case.experts, hidden, intermediate, size=intermediate**-0.5),
        topk_weights=weights / weights.sum(1, keepdim=True),
        topk_ids=ids,
        tables=_random_tables(case, generator),
        token_slot=token_slot,
    )


def _random_tables(case: Case, generator: torch.Generator) -> ExpertLoraTables:
    slots, experts = case.adapters, case.experts
    on = {"device": DEVICE, "generator": generator}
    ranks = torch.tensor([case.rank, case.rank // 2], device=DEVICE)[
        torch.arange(slots, device=DEVICE) % 2
    ]
    multiple = 8 if case.rank % 16 == 0 else 1
    largest = case.rank * 2 * max(case.hidden, case.intermediate)
    places = torch.randint(0, (POOL_ELEMENTS - largest) // 8, (4, slots, experts), **on)
    offsets = places * 8 if multiple == 8 else places * 8 + torch.randint(0, 8, places.shape, **on)
    layout = torch.tensor(LAYOUTS, dtype=torch.int32, device=DEVICE)[
        (torch.arange(slots, device=DEVICE) + case.rank) % len(LAYOUTS)
    ]
    for number, shared in ((0, SHARED_A13), (3, SHARED_B2)):
        mine = (layout & shared) != 0
        offsets[number][mine] = offsets[number][mine, :1].expand(-1, experts)
    # A tenth of the experts is left alone by an adapter, gate and up apart from down.
    gone = torch.rand(2, slots, experts, **on) < 0.1
    gone[:, :, 0] = False
    offsets[:2][gone[0].expand(2, -1, -1)] = -1
    offsets[2:][gone[1].expand(2, -1, -1)] = -1
    # Of the size that makes what is added as large as what it is added to.
    inner = torch.tensor([case.hidden, case.hidden, case.intermediate], device=DEVICE)
    size = 1 / (FACTOR_SIZE**2 * (inner * ranks[:, None, None]).sqrt())
    scale = size * (0.5 + torch.rand(slots, experts, 3, **on))
    pool = torch.randn(POOL_ELEMENTS, **on) * FACTOR_SIZE
    return ExpertLoraTables(
        pool=pool.to(case.dtype),
        offset_a13=offsets[0].contiguous(),
        offset_b13=offsets[1].contiguous(),
        offset_a2=offsets[2].contiguous(),
        offset_b2=offsets[3].contiguous(),
        rank=ranks[:, None, None].expand(-1, experts, 3).int().contiguous(),
        scale=scale,
        layout=layout,
        max_rank=16 if case.rank == 16 else 256,
        rank_multiple=multiple,
    )


T = TypeVar("T", Layer, ExpertLoraTables, DenseLoraTables)


def on_gpu(given: T) -> T:
    """A layer or tables with every tensor on the device."""
    moved = {}
    for field in fields(given):
        value = getattr(given, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(DEVICE)
        elif isinstance(value, ExpertLoraTables):
            moved[field.name] = on_gpu(value)
    return replace(given, **moved)


def batch_of(layer: Layer) -> LoraBatch:
    batch = LoraBatch.from_token_slot(layer.token_slot)
    assert batch is not None
    return batch


def assert_near(actual: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """Relative Frobenius error; nothing may differ where nothing is expected."""
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all()), "not finite"
    off = float((actual.double() - expected.double()).norm())
    size = float(expected.double().norm())
    assert off <= error * size, f"relative error {off / size if size else off:.2e}, of {error}"
