"""Both Triton backends against the reference, float32 and float16."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex.kernels import FUSED_GATE_UP, SHARED_A13, SHARED_B2

from ..cases import assert_close, random_layer
from .layers import (
    BACKENDS,
    LAYOUTS,
    TILES,
    TOLERANCE,
    aligned_layer,
    examples,
    interpreted,
    laid_out,
    ordered,
    run,
    tiles,
)

pytestmark = interpreted

LAYERS = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(1, 20),
    "hidden": st.integers(1, 70),
    "intermediate": st.integers(1, 50),
    "num_experts": st.integers(1, 7),
    "slots": st.integers(1, 5),
    "skipped": st.sampled_from([0.0, 0.3]),
    "absent": st.sampled_from([0.0, 0.3, 1.0]),
    "unused_slots": st.sampled_from([(), (0,)]),
    "gpt_oss": st.booleans(),
}
RANKS = st.sampled_from([(0, 1, 3, 8, 16), (1, 2, 64), (8,), (0,), (5, 33), (1, 100)])
DTYPES = st.sampled_from(list(TOLERANCE))
ID_DTYPES = st.sampled_from([torch.int32, torch.int64])


@examples(60)
@given(data=st.data(), dtype=DTYPES, id_dtype=ID_DTYPES, cut=TILES, top_k=st.integers(1, 3))
def test_any_batch_gives_what_the_reference_says(data, dtype, id_dtype, cut, top_k):
    shape = data.draw(st.fixed_dictionaries(LAYERS))
    shape |= {"top_k": min(top_k, shape["num_experts"]), "dtype": data.draw(DTYPES)}
    if data.draw(st.booleans(), label="aligned"):
        layer = aligned_layer(**shape)
    else:
        layer = random_layer(**shape, ranks=data.draw(RANKS))
    if data.draw(st.booleans(), label="ordered"):
        layer = ordered(layer)
    if data.draw(st.booleans(), label="least max_rank"):
        layer.tables.max_rank = max(1, int(layer.tables.rank.max()))
    layer.tables.shared_outer = data.draw(st.booleans(), label="shared outer")
    layer = layer.in_dtype(dtype)
    layer.topk_ids = layer.topk_ids.to(id_dtype)
    # Plain stages take the interpreter twice as long.
    backend = BACKENDS[data.draw(st.sampled_from(["fused", "fused", "hooked"]))]
    out = run(layer, backend(cut))
    assert out.dtype == dtype
    assert_close(out, layer.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "layout"), [
    ("fused", 0),
    ("fused", FUSED_GATE_UP),
    ("fused", SHARED_A13),
    ("fused", SHARED_B2),
    ("fused", SHARED_A13 | SHARED_B2),
    ("fused", FUSED_GATE_UP | SHARED_A13),
    ("fused", FUSED_GATE_UP | SHARED_A13 | SHARED_B2),
    ("hooked", SHARED_A13 | SHARED_B2),
    ("hooked", FUSED_GATE_UP),
])  # fmt: skip
def test_every_layout(backend, layout):
    layer = random_layer(layout, 12, layouts=(layout,), absent=0.0)
    assert_close(run(layer, BACKENDS[backend](tiles())), layer.expected())


@pytest.mark.parametrize(("backend", "splits", "expand_k", "expand_ahead"), [
    ("fused", 1, 16, False),
    ("fused", 1, 32, True),
    ("fused", 1, 64, False),
    ("fused", 3, 16, True),
    ("fused", 3, 64, True),
    ("hooked", 1, 32, False),
    ("hooked", 3, 32, False),
])  # fmt: skip
def test_many_adapters_of_all_ranks_in_one_block(backend, splits, expand_k, expand_ahead):
    """Groups of several adapters share a dot, and one adapter's groups fall into several."""
    layer = random_layer(
        2, 16, num_experts=1, top_k=1, slots=16, ranks=(0, 1, 15, 16, 17, 40), absent=0.1
    )
    layer.token_slot = torch.arange(16, dtype=torch.int32) - 1
    cut = tiles(expand_k=expand_k, expand_ahead=expand_ahead, splits=splits, groups=3)
    assert_close(run(layer, BACKENDS[backend](cut)), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aligned", [False, True])
def test_ranks_up_to_256_beside_small_ones(backend, aligned):
    ranks = (8, 256) if aligned else (1, 255, 256)
    make = aligned_layer if aligned else random_layer
    layer = make(3, 8, hidden=20, intermediate=12, num_experts=2, ranks=ranks, absent=0.0)
    assert_close(run(layer, BACKENDS[backend](tiles())), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("short", [False, True])
def test_tall_blocks_full_and_half_filled(backend, short):
    """Of 64 rows; the second expert's last block holds fewer than half."""
    layer = random_layer(4, 90, num_experts=2, top_k=1, hidden=32, intermediate=16, slots=3)
    layer.topk_ids = (torch.arange(90) >= 60).int().view(90, 1)
    cut = tiles(block_m=64, rows=32, short=short)
    assert_close(run(layer, BACKENDS[backend](cut)), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tiles_that_a_layer_gets_when_none_are_given(backend, dtype):
    layer = random_layer(5, 10).in_dtype(dtype)
    assert_close(run(layer, BACKENDS[backend]()), layer.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tma", [False, True])
def test_sizes_that_tiles_divide(backend, tma):
    """The loops without bounds: whole steps, whole tiles."""
    layer = random_layer(6, 12, hidden=64, intermediate=32)
    assert_close(run(layer, BACKENDS[backend](tiles(tma=tma))), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_on_one_expert(backend):
    layer = random_layer(7, 40, top_k=1)
    layer.topk_ids.fill_(4)
    assert_close(run(layer, BACKENDS[backend](tiles())), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend):
    for slot in (-1, 2):
        layer = random_layer(8, 1, used_slots=(slot,), absent=0.0, top_k=3)
        layer.token_slot.fill_(slot)
        assert_close(run(layer, BACKENDS[backend](tiles())), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_pairs_of_this_rank(backend):
    empty, elsewhere = random_layer(9, 0), random_layer(9, 7, skipped=1.0)
    assert run(empty, BACKENDS[backend](tiles())).shape == (0, 40)
    assert run(empty, BACKENDS[backend](tiles()), adapted=False).shape == (0, 40)
    for adapted in (True, False):
        out = run(elsewhere, BACKENDS[backend](tiles()), adapted=adapted)
        assert torch.equal(out, torch.zeros(7, 40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gpt_oss", [False, True])
def test_base_model_only(backend, gpt_oss):
    layer = random_layer(10, 12, gpt_oss=gpt_oss)
    out = run(layer, BACKENDS[backend](tiles()), adapted=False)
    assert_close(out, layer.expected_base())
    # A GPU's batch is made before anyone knows that nobody in it has an adapter.
    layer.token_slot.fill_(-1)
    assert_close(run(layer, BACKENDS[backend](tiles())), layer.expected_base())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [torch.float32, torch.float16])
def test_factors_of_another_precision_than_the_activations(backend, pool):
    layer = random_layer(11, 12, dtype=pool)
    dtype = torch.float16 if pool == torch.float32 else torch.float32
    layer = layer.in_dtype(dtype)
    out = run(layer, BACKENDS[backend](tiles(splits=2)))
    assert_close(out, layer.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "like"),
    [("x", LAYOUTS[0]), ("x", LAYOUTS[1]), ("topk_weights", LAYOUTS[0]), ("topk_ids", LAYOUTS[1])],
)
def test_inputs_may_be_strided(backend, name, like):
    layer = random_layer(12, 8)
    strided = replace(layer, **{name: laid_out(getattr(layer, name), like)})
    assert_close(run(strided, BACKENDS[backend](tiles())), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend):
    layer = random_layer(13, 12)
    before = [tensor.clone() for tensor in (*layer.args(), layer.token_slot)]
    pool = layer.tables.pool.clone()
    run(layer, BACKENDS[backend](tiles()))
    for was, now in zip(before, (*layer.args(), layer.token_slot), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(pool.nan_to_num(), layer.tables.pool.nan_to_num())
