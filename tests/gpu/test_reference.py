"""The reference of large batches is the definition's equal on small ones. Needs no GPU."""

import pytest
import torch

from ..kernels.cases import assert_close, random_layer
from . import reference


@pytest.mark.parametrize("seed", range(6))
def test_the_layer_is_as_the_definition_says(seed, monkeypatch):
    monkeypatch.setattr(reference, "GATHER_ELEMENTS", 4000)  # several gathers
    layer = random_layer(seed, 40, skipped=0.2 * (seed % 2), ranks=(0, 1, 3, 8, 33))
    assert_close(reference.moe(layer), layer.expected())
    assert_close(reference.moe(layer, adapted=False), layer.expected_base())


def test_the_parts_are_what_adapters_add():
    """Each stage's delta is the difference that its factors alone make."""
    layer = random_layer(7, 30, layouts=(0,))
    pairs = reference.pairs_of(layer)
    rows = layer.topk_ids.numel()
    assert pairs.pair.tolist() == list(range(rows))
    layer.w13.zero_()
    only_gate_up = random_layer(7, 30, layouts=(0,)).tables
    only_gate_up.offset_a2.fill_(-1)
    layer.tables = only_gate_up
    activated = reference.swiglu(reference.gate_up_delta(layer, pairs))
    y = reference.down_base(layer, pairs, activated)
    assert not reference.down_delta(layer, pairs, activated).any()
    assert_close(reference.combine(layer, pairs, y), layer.expected())
    layer.w2.zero_()
    assert torch.equal(layer.expected(), torch.zeros(30, 40))
