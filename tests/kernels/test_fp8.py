"""FP8 weights: what they mean, the torch backend against it, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import FP8, FP8_BLOCK, dequantise_fp8, fp8_blocks, fused_moe

from .cases import Layer, assert_close, random_layer
from .fp8 import e4m3, fp8_layer, random_codes


def run(layer: Layer) -> torch.Tensor:
    return fused_moe(*layer.args(), layer.tables, layer.token_slot, **layer.options())


def test_codes_mean_what_the_format_says():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    want = torch.tensor([e4m3(code) for code in range(256)])
    got = dequantise_fp8(codes[None], torch.ones(1, 2))[0]
    assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    assert int(got.isnan().sum()) == 2


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    first_row=st.integers(0, 300),
    first_column=st.integers(0, 300),
    seed=st.integers(0, 2**31),
)
def test_any_part_of_a_matrix_takes_its_blocks_scales(rows, columns, first_row, first_column, seed):
    whole = random_codes(seed, first_row + rows, first_column + columns)
    scale = torch.rand(fp8_blocks(whole.shape[0]), fp8_blocks(whole.shape[1])) + 0.1
    spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    want = whole.float() * spread[: whole.shape[0], : whole.shape[1]]
    part = (slice(first_row, None), slice(first_column, None))
    blocks = tuple(slice(s.start // FP8_BLOCK, None) for s in part)
    got = dequantise_fp8(whole[part], scale[blocks], first_row, first_column)
    assert torch.equal(got, want[part])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 20),
    hidden=st.sampled_from([1, 40, 128, 200, 384]),
    intermediate=st.sampled_from([128, 384]),
    num_experts=st.integers(2, 5),
    skipped=st.sampled_from([0.0, 0.3]),
    gpt_oss=st.booleans(),
)
def test_the_torch_backend_gives_what_the_reference_says(**shape):
    layer = fp8_layer(**shape)
    assert_close(run(layer), layer.expected())
    assert_close(fused_moe(*layer.args(), **layer.options()), layer.expected_base())


def test_the_reference_is_that_of_dequantised_weights():
    layer = fp8_layer(1, 20, hidden=200, intermediate=384)
    scales = layer.w13_scale, layer.w2_scale
    assert scales[0] is not None
    assert scales[1] is not None
    plain = replace(
        layer,
        w13=dequantise_fp8(layer.w13, scales[0]), w2=dequantise_fp8(layer.w2, scales[1]),
        w13_scale=None, w2_scale=None,
    )  # fmt: skip
    assert torch.equal(layer.expected(), plain.expected())
    assert_close(run(plain), layer.expected())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_rounds_activations_alone(dtype, tolerance):
    layer = fp8_layer(2, 20, hidden=200, intermediate=128).in_dtype(dtype)
    out = run(layer)
    assert out.dtype == dtype
    assert_close(out, layer.expected(), tolerance)


# Of a layer of 3 experts, 200 and 128 wide.
WRONG = [
    ("w13_scale", lambda _: None, "w13_scale must be given with FP8 weights; w13 is torch.float8"),
    ("w2_scale", lambda _: None, "w2_scale must be given with FP8 weights"),
    ("w13_scale", lambda s: s[:, :1], r"w13_scale must have shape \[3, 2, 2\], got \[3, 1, 2\]"),
    ("w2_scale", lambda s: s[:-1], r"w2_scale must have shape \[3, 2, 1\], got \[2, 2, 1\]"),
    ("w2_scale", lambda s: s.bfloat16(), "w2_scale must be torch.float32, got torch.bfloat16"),
    ("w13_scale", lambda s: s.to("meta"), "w13_scale must be on cpu, got meta"),
    ("w2", lambda w: w.float(), "w2 must be torch.float8_e4m3fn, got torch.float32"),
    ("w13", lambda w: w.float(), "w2 must be torch.float32, got torch.float8_e4m3fn"),
    ("w13", lambda w: w.view(torch.float8_e5m2), "w13 must be torch.float32, got torch.float8_e5"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=range(len(WRONG)))
def test_what_doesnt_fit_is_refused_by_name(name, change, message):
    layer = fp8_layer(3, 9, hidden=200, intermediate=128, num_experts=3)
    run(layer)
    with pytest.raises(ValueError, match=message):
        run(replace(layer, **{name: change(getattr(layer, name))}))


def test_scales_of_plain_weights_are_refused():
    layer = random_layer(4, 9)
    with pytest.raises(ValueError, match=r"w13_scale is for FP8 weights; w13 is torch.float32"):
        run(replace(layer, w13_scale=torch.ones(6, 1, 1)))


def test_a_block_that_holds_gate_and_up_rows_is_refused():
    layer = fp8_layer(5, 9, hidden=128, intermediate=192)
    with pytest.raises(ValueError, match="got 192; shards that cut a 128-block need EP"):
        run(layer)
