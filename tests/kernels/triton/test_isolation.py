"""No adapter's factors or rows reach another's, and work follows what is active."""

import importlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from loraplex.kernels.gpu import FusedBackend
from triton.runtime.interpreter import InterpretedFunction

from ..cases import Layer, assert_close, random_layer
from ..factors import random_dense_tables
from .layers import BACKENDS, TOLERANCE, batch_of, interpreted, ordered, run, tiles

pytestmark = interpreted


def one_row(layer: Layer, token: int) -> Layer:
    row = slice(token, token + 1)
    names = ("x", "topk_weights", "topk_ids", "token_slot")
    return replace(layer, **{name: getattr(layer, name)[row] for name in names})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_is_the_same_whatever_else_is_in_the_batch(backend, dtype):
    layer = random_layer(1, 20, num_experts=2).in_dtype(dtype)
    kernels = BACKENDS[backend](tiles())
    together = run(layer, kernels)
    for token in (0, 7, 19):
        assert_close(together[token : token + 1], run(one_row(layer, token), kernels),
                     TOLERANCE[dtype])  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(backend, value):
    """One tenant's non-finite activations leave all other tokens as they were."""
    layer = random_layer(2, 12, num_experts=2)
    kernels = BACKENDS[backend](tiles())
    before = run(layer, kernels)
    layer.x[11] = value
    after = run(layer, kernels)
    others = torch.arange(12) != 11
    assert torch.equal(after[others], before[others])
    assert not after[11].isfinite().any()


@pytest.mark.parametrize(("backend", "factor", "value"), [
    ("fused", "a13", torch.nan),
    ("fused", "a2", torch.nan),
    ("hooked", "a13", torch.nan),
    ("hooked", "a2", torch.inf),
])  # fmt: skip
def test_a_poisoned_adapter_reaches_its_own_tokens_only(backend, factor, value):
    """By its A, which no other adapter's rows are multiplied with. B is taken as finite."""
    options = {"num_experts": 2, "slots": 3, "ranks": (8,), "layouts": (0,), "absent": 0.0}
    clean, layer = random_layer(3, 9, **options), random_layer(3, 9, **options)
    for expert in range(2):
        offset = int(getattr(layer.tables, f"offset_{factor}")[1, expert])
        layer.tables.pool[offset : offset + 24 * 8] = value
    kernels = BACKENDS[backend](tiles())
    before, after = run(clean, kernels), run(layer, kernels)
    others = layer.token_slot != 1
    assert_close(after[others], clean.expected()[others])
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[~others], before[~others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_slots_are_not_read(backend):
    """A slot that holds nothing may still have tokens (its ranks and scales are stale)."""
    layer = random_layer(4, 12, slots=3, ranks=(8,), unused_slots=(1,))
    out = run(layer, BACKENDS[backend](tiles()))
    as_base = replace(layer, token_slot=layer.token_slot.where(layer.token_slot != 1, -1))
    assert_close(out, as_base.expected())


def launches_of(work) -> list[tuple[str, tuple[int, ...]]]:
    """Names and grids of what `work` launches."""
    launched = []
    real = InterpretedFunction.run

    def counted(self, *args, grid, **kwargs):
        launched.append((self.fn.__name__, tuple(grid)))
        return real(self, *args, grid=grid, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", counted):
        work()
    return launched


def test_launches_of_a_layer():
    """Base batches do no LoRA work at all; adapters cost two launches."""
    layer = random_layer(5, 8)
    base = launches_of(lambda: run(layer, FusedBackend(tiles()), adapted=False))
    lora = launches_of(lambda: run(layer, FusedBackend(tiles())))
    assert len(base) == 4
    assert len(lora) == 6
    names = [name for name, _ in base]
    assert [name for name, _ in lora if name in names] == names
    assert not any("shrink" in name for name in names)


def test_work_follows_active_slots_not_configured_ones():
    few, many = (
        launches_of(
            lambda slots=slots: run(
                random_layer(6, 20, slots=slots, used_slots=(0, 1, 2, 3), ranks=(8,)),
                FusedBackend(tiles()),
            )
        )
        for slots in (4, 256)
    )
    assert few == many


def test_launches_of_dense_projections():
    """Two for q, k and v together; the order of the tokens is made once a step."""
    lora_linear_ = importlib.import_module("loraplex.kernels.gpu.lora").lora_linear_
    tables = random_dense_tables(7, 3, 32, (16, 8, 8))
    x, batch = torch.randn(10, 32), batch_of(torch.arange(10, dtype=torch.int32) % 3)
    first = launches_of(lambda: lora_linear_(torch.zeros(10, 32), x, tables, batch))
    second = launches_of(lambda: lora_linear_(torch.zeros(10, 32), x, tables, batch))
    assert len(second) == 2
    assert first[-2:] == second
    assert len(first) == 3


def test_an_ordered_batch_and_a_mixed_one_give_the_same_rows():
    layer = random_layer(8, 20)
    order = layer.token_slot.argsort(stable=True)
    sorted_layer = ordered(
        replace(
            layer, x=layer.x[order], topk_weights=layer.topk_weights[order],
            topk_ids=layer.topk_ids[order],
        )
    )  # fmt: skip
    backend = FusedBackend(tiles())
    assert torch.equal(run(layer, backend)[order], run(sorted_layer, backend))
