"""A row's result is its own: whatever else is in the batch, whatever other adapters hold."""

from dataclasses import replace

import pytest
import torch
from loraplex.kernels import fused_moe

from ..kernels.cases import Layer, assert_close
from . import reference
from .layers import NEEDS_GPU, Case, assert_near, random_layer

pytestmark = NEEDS_GPU

# Relative to the largest value: other tiles sum in another order, and halves round what they store.
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def run(layer: Layer) -> torch.Tensor:
    return fused_moe(*layer.args(), layer.tables, layer.token_slot)


def rows_of(layer: Layer, rows) -> Layer:
    names = ("x", "topk_weights", "topk_ids", "token_slot")
    return replace(layer, **{name: getattr(layer, name)[rows].contiguous() for name in names})


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_row_is_the_same_whatever_else_is_in_the_batch(dtype):
    layer = random_layer(Case(300, 4, 16, 8, 16, dtype))
    together = run(layer)
    # Alone, in a small batch, among copies of itself, and with the batch in another order.
    for token in (0, 17, 299):
        alone = run(rows_of(layer, [token]))
        assert_close(alone, together[token : token + 1], ROUNDING[dtype])
        copies = run(rows_of(layer, [token] * 40))
        assert_close(copies, together[token].expand(40, -1), ROUNDING[dtype])
        assert torch.equal(copies, copies[:1].expand_as(copies))
    some = [5, 299, 0, 123, 17, 44]
    assert_close(run(rows_of(layer, some)), together[some], ROUNDING[dtype])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    assert_close(run(rows_of(layer, order)), together[order], ROUNDING[dtype])


def test_runs_are_repeatable():
    """No atomics: the same batch gives the same bits."""
    layer = random_layer(Case(300, 4, 16, 8, 16, torch.bfloat16))
    first = run(layer)
    for _ in range(3):
        assert torch.equal(run(layer), first)


def test_a_bad_row_stays_alone():
    layer = random_layer(Case(100, 4, 16, 8, 16, torch.bfloat16))
    before = run(layer)
    layer.x[31] = torch.nan
    after = run(layer)
    others = torch.arange(100, device=layer.x.device) != 31
    assert torch.equal(after[others], before[others])
    assert bool(after[31].isnan().all())


@pytest.mark.parametrize("factor", ["a13", "a2"])
def test_a_poisoned_adapter_reaches_its_own_tokens_only(factor):
    layer = random_layer(Case(100, 4, 16, 8, 16, torch.bfloat16))
    tables = layer.tables
    before = run(layer)
    # A block that nobody else's lies over: at the pool's end, which is made longer for it.
    end = tables.pool.numel()
    bad = torch.full((2 * 16 * 512,), torch.nan, dtype=tables.pool.dtype, device=layer.x.device)
    tables.pool = torch.cat((tables.pool, bad))
    getattr(tables, f"offset_{factor}")[3] = end
    after = run(layer)
    others = layer.token_slot != 3
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[~others], before[~others])


@pytest.mark.parametrize("slots", [8, 256])
def test_configured_slots_change_nothing(slots):
    case = Case(100, 4, 16, slots, 16, torch.bfloat16)
    layer = random_layer(case)
    layer.token_slot = layer.token_slot.clamp(max=7)
    few = replace(layer, tables=_first_slots(layer.tables, 8))
    assert torch.equal(run(layer), run(few))
    assert_near(run(layer), reference.moe(layer), 1e-2)


def _first_slots(tables, count: int):
    names = ("offset_a13", "offset_b13", "offset_a2", "offset_b2", "rank", "scale", "layout")
    return replace(tables, **{name: getattr(tables, name)[:count].contiguous() for name in names})
