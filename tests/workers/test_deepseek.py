"""What only DeepSeek has: its routing, what of it can be adapted, its published configs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from loraplex.adapter_store import AdapterRefused, BaseModel
from loraplex.adapter_store.peft_keys import parse_key
from loraplex.workers import EngineConfig, ModelUnsupported
from loraplex.workers.config import ModelConfig
from loraplex.workers.deepseek_config import RoutingGroups
from loraplex.workers.layers.routing import GroupRouting
from loraplex.workers.pool.dense_groups import dense_groups
from loraplex.workers.shard import Shard
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from .tiny_models import TinyModel, make_tiny_model


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> TinyModel:
    return make_tiny_model("deepseek_v2", tmp_path_factory.mktemp("lite"))


@pytest.mark.parametrize("kind", ["greedy", "group_limited_greedy", "sigmoid", "unnormalised"])
def test_experts_are_chosen_as_transformers_chooses_them(kind):
    experts, top_k = 64, 6
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 2.5,
    }
    bias = None
    if kind in ("sigmoid", "unnormalised"):
        config = DeepseekV3Config(**sizes, norm_topk_prob=kind == "sigmoid")
        router = DeepseekV3TopkRouter(config)
        bias = torch.randn(experts)
        router.e_score_correction_bias.copy_(bias)
    else:
        config = DeepseekV2Config(**sizes, topk_method=kind)
        router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    groups = RoutingGroups.from_config(config.to_dict())
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(200, 16))
    mine = GroupRouting(top_k, bool(config.norm_topk_prob), groups, bias)(logits)
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == torch.int32
    expected = torch.zeros(200, experts).scatter(1, ids, weights)
    found = torch.zeros(200, experts).scatter(1, mine[1].long(), mine[0])
    assert torch.allclose(found, expected, atol=1e-6)
    assert ((found > 0).sum(-1) == top_k).all()


KEY = "base_model.model.model.layers.{}.lora_A.weight"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            "1.self_attn.kv_b_proj",
            "adapting kv_b_proj isn't served: .* on q_proj, kv_a_proj_with_mqa, o_proj instead",
        ),
        ("1.mlp.gate", "adapting the router isn't served"),
        ("0.mlp.shared_experts.up_proj", "layer 0 of model has no experts"),
        ("0.mlp.experts.1.up_proj", "layer 0 of model has no experts"),
        ("1.mlp.up_proj", "layer 1 of model has experts in place of mlp.up_proj"),
        ("1.self_attn.q_a_proj", "self_attn.q_a_proj isn't served; adapters may target q_proj"),
        ("1.mlp.shared_expert.up_proj", "isn't served; adapters may target q_proj"),
    ],
)
def test_what_cant_be_adapted_is_refused_with_the_reason(lite, module, reason):
    with pytest.raises(AdapterRefused, match=reason) as refused:
        parse_key(KEY.format(module), lite.base)
    assert refused.value.key == KEY.format(module)
    assert refused.value.code == "unsupported_target"


def test_the_base_model_is_the_same_whoever_wrote_its_config(lite, tmp_path):
    config = json.loads((lite.folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(lite.folder / "model.safetensors")
    del config["head_dim"]  # DeepSeek's own have none, transformers gives its rotated part
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert BaseModel.from_folder(tmp_path).fingerprint == lite.base.fingerprint
    (tmp_path / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 0}))
    other = BaseModel.from_folder(tmp_path)
    assert other.fingerprint != lite.base.fingerprint
    assert (other.moe_layers, lite.base.moe_layers) == ((0, 1), (1,))


_COMMON = {
    "attention_bias": False, "hidden_act": "silu", "kv_lora_rank": 512, "moe_layer_freq": 1,
    "max_position_embeddings": 163840, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "v_head_dim": 128,
}  # fmt: skip
_V2 = _COMMON | {
    "model_type": "deepseek_v2", "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_experts_per_tok": 6, "scoring_func": "softmax", "vocab_size": 102400,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
V2_LITE = _V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
V2 = _V2 | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy", "vocab_size": 102400,
}  # fmt: skip
V3 = _COMMON | {  # R1's is the same
    "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def read(folder, raw) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return EngineConfig(str(folder)).model


def test_v2_lite_as_published(tmp_path):
    model = read(tmp_path, V2_LITE)
    latent, yarn = model.latent, model.yarn
    assert latent is not None
    assert yarn is not None
    assert (latent.q_rank, latent.head, latent.cached, latent.value) == (None, 192, 576, 128)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.rope_dim) == (16, 1, 192, 64)
    assert (model.num_experts, model.top_k, model.moe_intermediate_size) == (64, 6, 1408)
    assert (model.dense_layers, model.dense_size, model.shared_expert_size) == (1, 10944, 2816)
    assert model.routing_groups == RoutingGroups("softmax", 1, 1, 1.0)
    assert yarn.attention_scaling == 1.0
    # 0.1 * 0.707 * ln(40) + 1 = 1.2608
    assert latent.softmax_scale == pytest.approx(1.2608**2 / 192**0.5, rel=1e-4)


def test_v2_as_published(tmp_path):
    model = read(tmp_path, V2)
    assert model.latent is not None
    assert model.latent.q_rank == 1536
    assert model.routing_groups == RoutingGroups("softmax", 8, 3, 16.0)
    assert not model.norm_topk_prob
    assert (model.num_experts, model.shared_expert_size, model.dense_size) == (160, 3072, 12288)


def test_v3_as_published(tmp_path):
    assert read(tmp_path, V3).quantisation is None
    fp8 = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    model = read(tmp_path, V3 | {"quantization_config": fp8})
    assert model.quantisation == "fp8"
    for size, ep in ((8, 1), (16, 1), (16, 16)):
        assert Shard(model, 0, size, ep).intermediate % 128 == 0
    assert model.latent is not None
    assert model.routing_groups == RoutingGroups("sigmoid", 8, 4, 2.5)
    assert model.norm_topk_prob
    assert (model.num_layers, model.dense_layers, model.shared_expert_size) == (61, 3, 2048)
    # 0.1 * ln(40) + 1 = 1.3689
    assert model.latent.softmax_scale == pytest.approx(1.3689**2 / 192**0.5, rel=1e-4)


def test_heads_are_cut_and_latents_repeated(tmp_path):
    model = read(tmp_path, V3)
    shard = Shard(model, rank=3, size=8)
    assert (shard.heads, shard.kv_heads) == (16, 1)
    assert shard.rows("q_b_proj") == (3 * 16 * 192, 4 * 16 * 192)
    assert shard.rows("kv_b_proj") == (3 * 16 * 256, 4 * 16 * 256)
    assert shard.rows("o_proj") == (3 * 16 * 128, 4 * 16 * 128)
    assert shard.rows("q_a_proj") == (0, 1536)
    assert shard.rows("kv_a_proj_with_mqa") == (0, 576)
    assert shard.rows("mlp.up_proj") == (3 * 2304, 4 * 2304)
    assert shard.rows("shared_experts.down_proj") == (3 * 256, 4 * 256)
    dense, moe = dense_groups(shard, 2), dense_groups(shard, 3)
    assert dense["gate_up"].out_sizes == (2304, 2304)
    assert moe["gate_up"].out_sizes == (256, 256)
    assert dense["qkv"].out_sizes == moe["qkv"].out_sizes == (1536, 576)
    with pytest.raises(ModelUnsupported, match="tp size 8 doesn't divide intermediate_size = 18"):
        Shard(replace(model, dense_size=18), 0, 8)


@pytest.mark.parametrize(
    ("raw", "option", "value"),
    [
        (V2, "topk_method", "noaux_tc"),
        (V2, "norm_topk_prob", True),
        (V2, "scoring_func", "sigmoid"),
        (V2, "mlp_bias", True),
        (V3, "topk_method", "greedy"),
        (V3, "moe_layer_freq", 2),
        (V3, "rope_interleave", False),
        (V3, "attention_bias", True),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_options_that_would_change_the_result_are_refused(tmp_path, raw, option, value):
    with pytest.raises(ModelUnsupported, match=re.escape(f"{option} = {value!r} isn't")):
        read(tmp_path, raw | {option: value})
