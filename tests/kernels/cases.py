"""Random MoE layers and batches, and the two ways in which the torch backend multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from loraplex.kernels import AlignedBatch, ExpertLoraTables, align_reference, mkl_gemm

from .factors import random_expert_tables, random_routing

PRODUCTS = ("mkl", "torch")


@contextmanager
def products_by(way: str) -> Iterator[None]:
    """Run the backend on MKL's batched products ("mkl") or on torch operations alone ("torch")."""
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

    def args(self) -> tuple:
        return (self.x, self.w13, self.w2, self.topk_weights, self.topk_ids)


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
    **tables,
) -> Layer:
    """Tokens draw their slot from `used_slots` (all of them by default) and the base model."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1, *(range(slots) if used_slots is None else used_slots)])
    weights, ids = random_routing(seed, tokens, num_experts, top_k, skipped=skipped)
    return Layer(
        x=torch.randn(tokens, hidden, generator=generator),
        w13=torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5,
        w2=torch.randn(num_experts, hidden, intermediate, generator=generator) / intermediate**0.5,
        topk_weights=weights,
        topk_ids=ids,
        tables=random_expert_tables(seed, slots, num_experts, hidden, intermediate, **tables),
        token_slot=choices[torch.randint(len(choices), (tokens,), generator=generator)].int(),
    )


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
    """Every array and count is exactly what `align_reference` says."""
    pairs, block_expert, segments = align_reference(ids, token_slot, block_size, num_experts)
    assert batch.sorted_pairs.tolist() == pairs
    assert batch.block_expert.tolist() == block_expert
    assert [tuple(segment) for segment in batch.segments.tolist()] == segments
    assert batch.num_blocks.tolist() == [len(block_expert)]
    assert batch.num_segments.tolist() == [len(segments)]
    for tensor in (batch.sorted_pairs, batch.block_expert, batch.segments, batch.num_blocks):
        assert tensor.dtype == torch.int32
