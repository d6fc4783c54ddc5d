"""The short way for factors that all experts share: one shrink a token, one expand a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import FUSED_GATE_UP, SHARED_A13, SHARED_B2, moe_reference
from loraplex.kernels.gpu import FusedBackend, shared_outer

from ..cases import assert_close, random_layer
from .layers import TILES, TOLERANCE, aligned_layer, interpreted, run, tiles

pytestmark = interpreted

LAYOUTS = (
    0,
    SHARED_A13,
    SHARED_B2,
    SHARED_A13 | SHARED_B2,
    FUSED_GATE_UP | SHARED_A13 | SHARED_B2,
)


def expected(layer) -> torch.Tensor:
    return moe_reference(*layer.args(), layer.tables, layer.token_slot)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    num_experts=st.integers(1, 7),
    skipped=st.sampled_from([0.0, 0.3]),
    absent=st.sampled_from([0.0, 0.4]),
    ranks=st.sampled_from([(0, 1, 8, 16), (5, 40), (8,)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    cut=TILES,
)
def test_any_mix_of_layouts_gives_what_the_reference_says(
    seed, tokens, num_experts, skipped, absent, ranks, dtype, cut
):
    layer = random_layer(
        seed, tokens, num_experts=num_experts, top_k=min(3, num_experts), skipped=skipped,
        absent=absent, ranks=ranks, layouts=LAYOUTS,
    ).in_dtype(dtype)  # fmt: skip
    layer.tables.shared_outer = True
    assert_close(run(layer, FusedBackend(cut)), expected(layer), TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_give_the_same(layout):
    layer = aligned_layer(layout, 30, layouts=(layout,))
    long_way = run(layer, FusedBackend(tiles()))
    layer.tables.shared_outer = True
    assert_close(run(layer, FusedBackend(tiles())), long_way)


def test_the_short_way_is_taken_only_where_the_pool_asks_for_it(monkeypatch):
    layer = random_layer(1, 8, layouts=(SHARED_A13 | SHARED_B2,))
    taken = []
    for name in ("shrink_tokens_kernel", "combine_shared_kernel"):
        kernel = getattr(shared_outer, name)

        class Watched:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                taken.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(shared_outer, name, Watched(kernel, name))
    run(layer, FusedBackend(tiles()))
    assert taken == []
    layer.tables.shared_outer = True
    run(layer, FusedBackend(tiles()))
    assert taken == ["shrink_tokens_kernel", "combine_shared_kernel"]
