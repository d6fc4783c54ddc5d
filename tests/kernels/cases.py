"""Random MoE layers and batches, and what results are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from loraplex.kernels import (
    AlignedBatch,
    ClampedSwiglu,
    ExpertLoraTables,
    MoeWeights,
    align_reference,
    mkl_gemm,
    moe_reference,
)

from .factors import random_expert_tables, random_routing

PRODUCTS = ("mkl", "torch")
Tensor = torch.Tensor
Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@contextmanager
def products_by(way: str) -> Iterator[None]:
    """Run the torch backend on MKL's batched products ("mkl") or on torch alone ("torch")."""
    if way == "mkl":
        if not mkl_gemm.usable(torch.zeros(1, 1)):
            pytest.skip("this torch has no batched MKL products")
        yield
    else:
        with mock.patch.object(mkl_gemm, "usable", return_value=False):
            yield


@dataclass
class Layer:
    """Inputs of one fused_moe call."""

    x: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    tables: ExpertLoraTables
    token_slot: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    clamped: ClampedSwiglu | None = None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None

    def args(self) -> Args:
        return (self.x, self.w13, self.w2, self.topk_weights, self.topk_ids)

    def options(self) -> dict[str, Any]:
        """What differs from a layer without biases, with plain SwiGLU and plain weights."""
        names = ("w13_bias", "w2_bias", "clamped", "w13_scale", "w2_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def weights(self) -> MoeWeights:
        return MoeWeights(self.w13, self.w2, **self.options())

    def expected(self) -> torch.Tensor:
        """What the reference says."""
        return moe_reference(*self.args(), self.tables, self.token_slot, **self.options())

    def expected_base(self) -> torch.Tensor:
        """What it says without adapters."""
        return moe_reference(*self.args(), **self.options())

    def in_dtype(self, dtype: torch.dtype) -> Layer:
        """Activations and base weights in another dtype. Factors, and FP8, stay as they are."""
        if self.w13_scale is not None:
            return replace(self, x=self.x.to(dtype))
        return replace(self, x=self.x.to(dtype), w13=self.w13.to(dtype), w2=self.w2.to(dtype))


def random_layer(
    seed: int,
    tokens: int,
    *,
    hidden: int = 40,
    intermediate: int = 24,
    num_experts: int = 6,
    top_k: int = 2,
    slots: int = 4,
    skipped: float = 0.0,
    used_slots: tuple[int, ...] | None = None,
    gpt_oss: bool = False,
    **tables,
) -> Layer:
    """Tokens draw their slot from `used_slots` (all of them by default) and the base model.

    gpt_oss: with biases and the clamped activation, its limit so low that much is clamped.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1, *(range(slots) if used_slots is None else used_slots)])
    weights, ids = random_routing(seed, tokens, num_experts, top_k, skipped=skipped)
    layer = Layer(
        x=torch.randn(tokens, hidden, generator=generator),
        w13=torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5,
        w2=torch.randn(num_experts, hidden, intermediate, generator=generator) / intermediate**0.5,
        topk_weights=weights,
        topk_ids=ids,
        tables=random_expert_tables(seed, slots, num_experts, hidden, intermediate, **tables),
        token_slot=choices[torch.randint(len(choices), (tokens,), generator=generator)].int(),
    )
    if gpt_oss:
        layer.w13_bias = torch.randn(num_experts, 2 * intermediate, generator=generator)
        layer.w2_bias = torch.randn(num_experts, hidden, generator=generator)
        layer.clamped = ClampedSwiglu(limit=0.7)
    return layer


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference within `tolerance` of the largest expected value (or of 0.1, where all of
    them happen to cancel out: inputs are of order one)."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    assert bool(actual.isfinite().all()), "not finite"
    worst = float((actual.float() - expected.float()).abs().max())
    size = float(expected.float().abs().max())
    assert worst <= tolerance * max(size, 0.1), f"off by {worst}, of values up to {size}"


def assert_aligned(
    batch: AlignedBatch,
    ids: torch.Tensor,
    token_slot: torch.Tensor | None,
    block_size: int,
    num_experts: int,
) -> None:
    """Every count, and every array as far as it is in use, is exactly what the reference says."""
    pairs, block_expert, segments = align_reference(ids, token_slot, block_size, num_experts)
    blocks, padding = len(block_expert), ids.numel()
    assert (batch.num_tokens, batch.top_k) == ids.shape
    assert (batch.block_size, batch.num_experts) == (block_size, num_experts)
    assert batch.num_blocks.tolist() == [blocks]
    assert batch.max_blocks >= blocks
    assert batch.sorted_pairs[: len(pairs)].tolist() == pairs
    assert batch.block_expert[:blocks].tolist() == block_expert
    # Padding fills a block from its end.
    real = [sum(p != padding for p in pairs[b * block_size :][:block_size]) for b in range(blocks)]
    ends = [b * block_size + real[b] for b in range(blocks)]
    assert batch.block_end[:blocks].tolist() == ends
    for tensor in (batch.sorted_pairs, batch.block_expert, batch.block_end, batch.num_blocks):
        assert tensor.dtype == torch.int32
    if token_slot is None:
        assert batch.segments is None
    else:
        assert listed_segments(batch) == segments


def listed_segments(batch: AlignedBatch) -> list[tuple[int, int, int, int]]:
    """The runs of all blocks in use, as (block, slot, first row, end row)."""
    assert batch.segments is not None
    segments, found = batch.segments, []
    for tensor in (segments.count, segments.slot, segments.first_row):
        assert tensor.dtype == torch.int32
    counts, slots = segments.count.tolist(), segments.slot.tolist()
    first_rows, ends = segments.first_row.tolist(), batch.block_end.tolist()
    for block in range(int(batch.num_blocks)):
        for nth in range(counts[block]):
            place = block * batch.block_size + nth
            last = nth + 1 == counts[block]
            end = ends[block] if last else first_rows[place + 1]
            found.append((block, slots[place], first_rows[place], end))
    return found
