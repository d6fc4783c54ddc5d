"""FP8 weights in both Triton backends against the reference, float32 and float16 activations."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..cases import assert_close
from ..fp8 import fp8_layer
from ..fp8_decode import assert_every_code_is_decoded
from .layers import (
    BACKENDS,
    TOLERANCE,
    examples,
    interpreted,
    laid_out,
    ordered,
    run,
    tiles,
)

pytestmark = interpreted


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_code_is_decoded_exactly(dtype):
    assert_every_code_is_decoded(dtype, "cpu")


@examples(25)
@given(
    data=st.data(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 20),
    hidden=st.sampled_from([40, 128, 200, 384]),
    intermediate=st.sampled_from([128, 384]),
    block_n=st.sampled_from([32, 64, 128, 256]),
    block_k=st.sampled_from([32, 64, 128]),
)
def test_any_batch_gives_what_the_reference_says(
    data, dtype, seed, tokens, hidden, intermediate, block_n, block_k
):
    """Steps within a block and of whole ones; columns within a block, of whole ones, of several;
    blocks that the hidden size cuts short."""
    cut = tiles(
        block_n=block_n, block_k=block_k, tma=data.draw(st.booleans(), label="tma"),
        persistent=data.draw(st.sampled_from([0, 1]), label="persistent"),
        expand_ahead=data.draw(st.booleans(), label="ahead"),
    )  # fmt: skip
    layer = fp8_layer(
        seed, tokens, hidden=hidden, intermediate=intermediate,
        num_experts=data.draw(st.integers(2, 5), label="experts"),
        skipped=data.draw(st.sampled_from([0.0, 0.3]), label="skipped"),
        gpt_oss=data.draw(st.booleans(), label="gpt-oss"),
    ).in_dtype(dtype)  # fmt: skip
    if data.draw(st.booleans(), label="ordered"):
        layer = ordered(layer)
    backend = BACKENDS[data.draw(st.sampled_from(["fused", "fused", "hooked"]))]
    out = run(layer, backend(cut))
    assert out.dtype == dtype
    assert_close(out, layer.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tall_blocks_full_and_half_filled(backend):
    """Of 64 rows; the second expert's last block holds fewer than half."""
    layer = fp8_layer(4, 90, num_experts=2, top_k=1, hidden=256, intermediate=128, slots=3)
    layer.topk_ids = (torch.arange(90) >= 60).int().view(90, 1)
    cut = tiles(block_m=64, block_n=64, block_k=128, rows=32, short=True)
    assert_close(run(layer, BACKENDS[backend](cut)), layer.expected())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tiles_that_a_layer_gets_when_none_are_given(backend, dtype):
    layer = fp8_layer(5, 10, hidden=200, intermediate=128, num_experts=3).in_dtype(dtype)
    assert_close(run(layer, BACKENDS[backend]()), layer.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_model_only(backend):
    layer = fp8_layer(6, 12, hidden=200, intermediate=128)
    out = run(layer, BACKENDS[backend](tiles(block_k=64)), adapted=False)
    assert_close(out, layer.expected_base())


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_that_are_no_number_reach_their_expert_alone(backend):
    layer = fp8_layer(7, 12, hidden=128, intermediate=128, num_experts=3, top_k=1)
    layer.topk_ids = (torch.arange(12) % 3).int().view(12, 1)
    layer.w13.view(torch.uint8)[1, 5, 7] = 0xFF
    out = run(layer, BACKENDS[backend](tiles(block_k=128)), adapted=False)
    assert torch.equal(out.isnan().any(1), layer.topk_ids[:, 0] == 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_over_several_blocks_are_refused(backend):
    layer = fp8_layer(8, 4, hidden=256, intermediate=128)
    with pytest.raises(ValueError, match="block_k that divides 128, got 256"):
        run(layer, BACKENDS[backend](tiles(block_k=256)))


@pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
def test_strided_scales_are_refused(name):
    layer = fp8_layer(9, 4, hidden=256, intermediate=128)
    strided = replace(layer, **{name: laid_out(getattr(layer, name), "every other element")})
    with pytest.raises(ValueError, match=f"{name} must be contiguous"):
        run(strided, BACKENDS["fused"](tiles()))
