import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.kernels import (
    FUSED_GATE_UP,
    SHARED_A13,
    SHARED_B2,
    ClampedSwiglu,
    LoraBatch,
    TorchBackend,
    fused_moe,
    gather_factors,
    moe_reference,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from .cases import PRODUCTS, assert_close, products_by, random_layer
from .hooks import BiasHooks

LAYERS = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(1, 40),
    "hidden": st.integers(1, 70),
    "intermediate": st.integers(1, 50),
    "num_experts": st.integers(1, 9),
    "slots": st.integers(1, 6),
    "skipped": st.sampled_from([0.0, 0.3]),
    "ranks": st.sampled_from([(0, 1, 3, 8, 16), (1, 2, 64), (8,), (0,), (5, 33)]),
    "absent": st.sampled_from([0.0, 0.3, 1.0]),
}


@pytest.mark.parametrize("way", PRODUCTS)
@settings(max_examples=120)
@given(**LAYERS, top_k=st.integers(1, 4))
def test_any_batch_gives_what_the_reference_says(way, top_k, **shape):
    layer = random_layer(top_k=min(top_k, shape["num_experts"]), **shape)
    expected = layer.expected()
    with products_by(way):
        out = fused_moe(*layer.args(), layer.tables, layer.token_slot)
    assert_close(out, expected)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", [
    0,
    FUSED_GATE_UP,
    SHARED_A13,
    SHARED_B2,
    SHARED_A13 | SHARED_B2,
    FUSED_GATE_UP | SHARED_A13,
    FUSED_GATE_UP | SHARED_A13 | SHARED_B2,
])  # fmt: skip
def test_every_layout(way, layout):
    layer = random_layer(layout, 30, layouts=(layout,), absent=0.0)
    expected = layer.expected()
    with products_by(way):
        assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 8, 33, 300])
def test_the_demo_models_shape(way, tokens):
    """Few and many rows per expert take different ways through the base product."""
    layer = random_layer(
        tokens, tokens, hidden=256, intermediate=128, num_experts=16, top_k=4, slots=5,
        ranks=(8, 16), one_rank_per_slot=True, absent=0.1, alignment=64,
    )  # fmt: skip
    expected = layer.expected()
    with products_by(way):
        assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


@pytest.mark.parametrize("way", PRODUCTS)
def test_all_tokens_on_one_expert(way):
    layer = random_layer(1, 50, top_k=1)
    layer.topk_ids.fill_(4)
    expected = layer.expected()
    with products_by(way):
        assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


@pytest.mark.parametrize("way", PRODUCTS)
def test_no_tokens_and_no_pairs_of_this_rank(way):
    empty, elsewhere = random_layer(2, 0), random_layer(3, 7, skipped=1.0)
    with products_by(way):
        assert fused_moe(*empty.args(), empty.tables, empty.token_slot).shape == (0, 40)
        out = fused_moe(*elsewhere.args(), elsewhere.tables, elsewhere.token_slot)
    assert torch.equal(out, torch.zeros(7, 40))


def test_the_reference_is_the_layer_with_merged_weights():
    """The definition against another one: W + scale * B A for each token's adapter."""
    layer = random_layer(7, 12)
    hidden, intermediate = 40, 24
    out = torch.zeros(12, hidden)
    for slot in range(-1, 4):
        w13, w2 = layer.w13.clone(), layer.w2.clone()
        for expert in range(6) if slot >= 0 else ():
            factors = gather_factors(layer.tables, slot, expert, hidden, intermediate)
            places = (w13[expert, :intermediate], w13[expert, intermediate:], w2[expert])
            for place, factor in zip(places, factors, strict=True):
                if factor is not None:
                    place += factor.scale * factor.b @ factor.a
        for t in (layer.token_slot == slot).nonzero().flatten().tolist():
            for k, expert in enumerate(layer.topk_ids[t].tolist()):
                gate, up = (w13[expert] @ layer.x[t]).split(intermediate)
                y = w2[expert] @ (torch.nn.functional.silu(gate) * up)
                out[t] += layer.topk_weights[t, k] * y
    assert_close(layer.expected(), out)


@pytest.mark.parametrize("way", PRODUCTS)
def test_base_model_only(way):
    layer = random_layer(8, 30)
    expected = layer.expected_base()
    nobody = torch.full((30,), -1, dtype=torch.int32)
    with products_by(way):
        assert_close(fused_moe(*layer.args()), expected)
        assert_close(fused_moe(*layer.args(), layer.tables, nobody), expected)
        assert_close(fused_moe(*layer.args(), layer.tables, None), expected)
        assert_close(fused_moe(*layer.args(), None, layer.token_slot), expected)


def test_a_batch_made_once_serves_every_layer():
    layers = [random_layer(seed, 25) for seed in range(3)]
    token_slot = layers[0].token_slot
    batch = LoraBatch.from_token_slot(token_slot)
    for layer in layers:
        expected = moe_reference(*layer.args(), layer.tables, token_slot)
        assert_close(fused_moe(*layer.args(), layer.tables, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_reference(dtype):
    layer = random_layer(9, 30, dtype=dtype)
    layer.x, layer.w13, layer.w2 = layer.x.to(dtype), layer.w13.to(dtype), layer.w2.to(dtype)
    expected = layer.expected()
    out = fused_moe(*layer.args(), layer.tables, layer.token_slot)
    assert out.dtype == dtype
    assert_close(out, expected, tolerance=3e-2)


def test_factors_of_another_precision_than_the_activations():
    layer = random_layer(10, 30, dtype=torch.bfloat16)
    expected = layer.expected()
    assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


def test_inputs_are_left_as_they_were():
    layer = random_layer(11, 20)
    given = [t.clone() for t in (*layer.args(), layer.token_slot)]
    pool = layer.tables.pool.clone()
    fused_moe(*layer.args(), layer.tables, layer.token_slot)
    for before, after in zip(given, (*layer.args(), layer.token_slot), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(pool.nan_to_num(), layer.tables.pool.nan_to_num())


@pytest.mark.parametrize("way", PRODUCTS)
def test_inputs_may_be_strided(way):
    layer = random_layer(12, 20)
    layer.x = torch.cat((layer.x, layer.x), 1)[:, :40]
    layer.w13 = layer.w13.transpose(1, 2).contiguous().transpose(1, 2)
    layer.w2 = torch.cat((layer.w2, layer.w2), 2)[:, :, :24]
    expected = layer.expected()
    with products_by(way):
        assert_close(fused_moe(*layer.args(), layer.tables, layer.token_slot), expected)


def test_stages_make_the_layer():
    """What a runner does that calls the stages itself."""
    layer, backend = random_layer(13, 20), TorchBackend()
    lora_batch = LoraBatch.from_token_slot(layer.token_slot)
    batch = backend.align(layer.topk_ids, lora_batch, layer.weights)
    h = backend.gate_up(layer.x, layer.weights, batch)
    backend.lora_gate_up_(h, layer.x, batch, layer.tables)
    a = backend.activate(h, layer.weights)
    y = backend.down(a, layer.weights, batch)
    backend.lora_down_(y, a, batch, layer.tables)
    out = backend.combine(y, layer.topk_weights, layer.topk_ids, batch)
    assert (h.shape, a.shape, y.shape) == ((40, 48), (40, 24), (40, 40))
    assert_close(out, layer.expected())


@pytest.mark.parametrize("adapted", [True, False])
def test_hooks_see_and_change_what_lies_between_the_stages(adapted):
    layer = random_layer(14, 20, skipped=0.3)
    lora_batch = LoraBatch.from_token_slot(layer.token_slot) if adapted else None

    def pairs_of(batch):
        return batch.sorted_pairs, torch.ones_like(batch.sorted_pairs, dtype=torch.bool)

    BiasHooks(layer, pairs_of).assert_seen_by(TorchBackend(), lora_batch)


@pytest.mark.parametrize("way", PRODUCTS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 30), skipped=st.sampled_from([0.0, 0.4]))
def test_the_clamped_activation_and_biases(way, seed, tokens, skipped):
    layer = random_layer(seed, tokens, skipped=skipped, gpt_oss=True)
    with products_by(way):
        out = fused_moe(*layer.args(), layer.tables, layer.token_slot, **layer.options())
        assert_close(out, layer.expected())
        assert_close(fused_moe(*layer.args(), **layer.options()), layer.expected_base())


def test_the_reference_of_gpt_oss_is_that_models_layer():
    config = transformers.GptOssConfig(
        hidden_size=40, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    experts = GptOssExperts(config).eval()
    layer = random_layer(15, 25, gpt_oss=True)
    layer.x *= 8.0  # beyond the limit of 7
    layer.clamped = ClampedSwiglu()
    assert layer.w13_bias is not None
    with torch.no_grad():
        # Gate and up rows alternate there, and the matrices are transposed.
        for ours, theirs in (
            (layer.w13, experts.gate_up_proj.transpose(1, 2)),
            (layer.w13_bias, experts.gate_up_proj_bias),
        ):
            theirs[:, ::2], theirs[:, 1::2] = ours.chunk(2, 1)
        experts.down_proj.copy_(layer.w2.transpose(1, 2))
        experts.down_proj_bias.copy_(layer.w2_bias)
        expected = experts(layer.x, layer.topk_ids.long(), layer.topk_weights)
    assert_close(layer.expected_base(), expected)
