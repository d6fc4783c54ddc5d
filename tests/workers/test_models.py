"""Every model family against transformers + PEFT, float32, on tiny random models."""

from __future__ import annotations

import json
import math
import random
import re
import socket
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.multiprocessing as mp
from loraplex.adapter_store import AdapterRefused
from loraplex.adapter_store.base_model import SUPPORTED_MODEL_TYPES
from loraplex.adapter_store.peft_keys import parse_key
from loraplex.workers import Engine, EngineConfig, ModelUnsupported, run_follower
from loraplex.workers.config import ModelConfig
from loraplex.workers.families import FAMILIES
from loraplex.workers.layers.blocks import WholeNorm, rms_norm
from loraplex.workers.layers.rope_parameters import Yarn
from loraplex.workers.models.registry import LAYERS
from safetensors import safe_open

from .tiny_models import CONFIGS, VOCAB, TinyModel, make_tiny_model

TOLERANCE = 1e-3
NEW_TOKENS = 8
SMALL_POOL = 128 << 10  # bytes: not all adapters fit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models by family, made when first asked for."""
    torch.set_num_threads(1)
    made: dict[str, TinyModel] = {}

    def get(family: str) -> TinyModel:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def requests_for(model: TinyModel, greedy, per_adapter: int = 2):
    """Prompts for the base model and every adapter, taking turns."""
    rng = random.Random(len(model.family))
    names = [None, *model.refs] * per_adapter
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(2, 50))] for _ in names]
    return names, [
        greedy(str(i), prompt, model.refs.get(name), max_tokens=NEW_TOKENS, prompt_logprobs=0)
        for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_base_and_adapters_of_all_formats_in_one_batch(tiny, family, run, greedy):
    model = tiny(family)
    oracles = {name: model.oracle(name) for name in (None, *model.refs)}
    names, requests = requests_for(model, greedy)
    engine = model.engine(max_batch_tokens=61)  # prompts are cut at odd places
    results = run(engine, requests)
    engine.close()
    base_logprobs = {}
    for name, request in zip(names, requests, strict=True):
        result, prompt = results[request.request_id], list(request.prompt_ids)
        assert result.last.error is None
        with torch.no_grad():
            ids = torch.tensor([prompt + result.tokens])
            logprobs = oracles[name](ids).logits[0].log_softmax(-1)[:-1]
            plain = oracles[None](ids).logits[0].log_softmax(-1)[:-1]
        # Greedy decoding, seen from its end: each token is the argmax after those before it.
        assert result.tokens == logprobs[len(prompt) - 1 :].argmax(-1).tolist(), name
        reference = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        assert (mine - reference).abs().max() <= TOLERANCE, name
        base_logprobs[name] = (logprobs - plain).abs().max()
    # Each adapter says something of its own: a loader that dropped it would have been seen.
    assert all(difference > 0.1 for name, difference in base_logprobs.items() if name)


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_checkpoints_give_the_same(tiny, family, run, greedy):
    model = tiny(family)
    fused = model.folder.parent / "fused"
    with safe_open(fused / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118
    _, requests = requests_for(model, greedy, 1)
    engines = [model.engine(), model.engine(model_path=str(fused))]
    expected, results = (run(engine, requests) for engine in engines)
    for engine in engines:
        engine.close()
    for request_id, result in results.items():
        assert result.tokens == expected[request_id].tokens
        assert same_logprobs(result, expected[request_id])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tp_2_equals_tp_1_in_every_family(tiny, run, greedy):
    models = [tiny(family) for family in CONFIGS]
    spawn = mp.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as followers:  # a process for all of rank 1
        for model in models:
            config = model.config(
                tp_size=2,
                rendezvous=f"tcp://127.0.0.1:{free_port()}",
                torch_threads=1,
                pool_bytes=SMALL_POOL,
            )
            follower = followers.submit(run_follower, config, 1)
            _, requests = requests_for(model, greedy)
            whole, cut = model.engine(), Engine(config, model.packs)
            expected, results = run(whole, requests), run(cut, requests)
            evictions = cut.report().evictions
            whole.close()
            cut.close()
            follower.result(20)
            assert evictions > 0, model.family  # slots and pages were taken again
            for request_id, result in results.items():
                assert result.last.error is None
                assert result.tokens == expected[request_id].tokens, model.family
                assert same_logprobs(result, expected[request_id])


def same_logprobs(result, expected) -> bool:
    mine = result.prompt_logprobs + result.logprobs
    reference = expected.prompt_logprobs + expected.logprobs
    return max(abs(a - b) for a, b in zip(mine, reference, strict=True)) <= 1e-4


def test_what_is_validated_is_what_is_served():
    tested = list(dict.fromkeys(config.model_type for config in CONFIGS.values()))
    assert list(FAMILIES) == list(LAYERS) == list(SUPPORTED_MODEL_TYPES) == tested


def test_other_model_types_are_refused_with_the_served_ones(tiny, tmp_path):
    with pytest.raises(
        ModelUnsupported, match="'llama' isn't served; served: " + ", ".join(FAMILIES)
    ):
        changed(tiny("olmoe"), tmp_path, model_type="llama")


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("olmoe", "clip_qkv", 8.0),
        ("olmoe", "attention_bias", True),
        ("olmoe", "hidden_act", "gelu"),
        ("qwen2_moe", "mlp_only_layers", [0]),
        ("qwen2_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "rope_parameters", {"rope_type": "llama3"}),
    ],
)
def test_options_that_would_change_the_result_are_refused(tiny, tmp_path, family, option, value):
    named, of = next(iter(value.items())) if isinstance(value, dict) else (option, value)
    with pytest.raises(ModelUnsupported, match=re.escape(f"{named} = {of!r} isn't")):
        changed(tiny(family), tmp_path, **{option: value})


@pytest.mark.parametrize("family", CONFIGS)
def test_quantised_weights_that_cant_be_read_are_refused(tiny, tmp_path, family):
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    if family in ("qwen3_moe", *(name for name in CONFIGS if name.startswith("deepseek"))):
        assert changed(tiny(family), tmp_path, quantization_config=fp8).quantisation == "fp8"
    else:
        with pytest.raises(ModelUnsupported, match=r"weights quantised by 'fp8' .* in bfloat16"):
            changed(tiny(family), tmp_path, quantization_config=fp8)
    mxfp4 = {"quant_method": "mxfp4"}
    if family == "gpt_oss":
        assert changed(tiny(family), tmp_path, quantization_config=mxfp4).quantisation == "mxfp4"
    else:
        with pytest.raises(ModelUnsupported, match="weights quantised by 'mxfp4'"):
            changed(tiny(family), tmp_path, quantization_config=mxfp4)


# The fields that matter of config.json as published for OLMoE-1B-7B-0924, Mixtral-8x7B-v0.1,
# Qwen1.5-MoE-A2.7B, gpt-oss-20b and gpt-oss-120b.
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2}
PUBLISHED = [
    _COMMON
    | {
        "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 50304,
    },
    _COMMON
    | {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000,
    },
    _COMMON
    | {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    *(
        _COMMON
        | {
            "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
            "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * half,
            "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
            "num_hidden_layers": 2 * half, "num_key_value_heads": 8, "num_local_experts": experts,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
            },
            "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
        }
        for half, experts in ((12, 32), (18, 128))
    ),
]  # fmt: skip


@pytest.mark.parametrize("raw", PUBLISHED, ids=lambda raw: raw["model_type"])
def test_configs_of_published_checkpoints_are_read(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = EngineConfig(str(tmp_path), kv_tokens=1 << 20).model
    family = model.model_type
    assert (model.num_experts, model.top_k, model.moe_intermediate_size) == {
        ("olmoe", 16): (64, 8, 1024),
        ("mixtral", 32): (8, 2, 14336),
        ("qwen2_moe", 24): (60, 4, 1408),
        ("gpt_oss", 24): (32, 4, 2880),
        ("gpt_oss", 36): (128, 4, 2880),
    }[family, model.num_layers]
    assert model.norm_topk_prob == (family in ("mixtral", "gpt_oss"))
    assert model.rope_theta == raw["rope_theta"]
    assert model.qkv_bias == (family in ("qwen2_moe", "gpt_oss"))
    assert model.shared_expert_size == raw.get("shared_expert_intermediate_size", 0)
    if family != "gpt_oss":
        assert (model.head_dim, model.o_bias, model.swiglu_clamp) == (128, False, None)
        assert model.layer_windows == (None,) * model.num_layers
        assert (model.yarn, model.quantisation) == (None, None)
        return
    assert (model.head_dim, model.o_bias, model.swiglu_clamp) == (64, True, (1.702, 7.0))
    assert model.layer_windows == (128, None) * (model.num_layers // 2)
    assert model.quantisation == "mxfp4"
    assert model.yarn == Yarn(32.0, 4096, 32.0, 1.0, False, 0.1 * math.log(32) + 1)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("mlp.shared_expert_gate", "the gate of the shared expert"),
        ("mlp.gate", "the router"),
        ("mlp.router", "the router"),
    ],
)
def test_adapted_gates_are_refused(tiny, module, what):
    key = f"base_model.model.model.layers.0.{module}.lora_A.weight"
    with pytest.raises(AdapterRefused, match=f"adapting {what} isn't served") as refused:
        parse_key(key, tiny("qwen2_moe").base)
    assert refused.value.key == key


def test_a_shared_expert_is_only_found_where_it_is(tiny):
    key = "base_model.model.model.layers.0.{}.shared_expert.up_proj.lora_A.weight"
    assert parse_key(key.format("mlp"), tiny("qwen2_moe").base)
    for module, family in (("self_attn", "qwen2_moe"), ("mlp", "olmoe")):
        with pytest.raises(AdapterRefused, match="isn't served; adapters may target q_proj"):
            parse_key(key.format(module), tiny(family).base)


def test_a_norm_over_all_heads_takes_repeated_kv_heads_once():
    """Four ranks for eight query and two KV heads: each KV head is on two ranks."""
    q, k = torch.randn(5, 8 * 4), torch.randn(5, 2 * 4)
    weights = torch.randn(8 * 4), torch.randn(2 * 4)
    rows = [(slice(8 * r, 8 * r + 8), slice(r // 2 * 4, r // 2 * 4 + 4)) for r in range(4)]

    class Ranks:
        size = 4

        def all_reduce(self, x):  # what the others would add
            total = sum(
                torch.stack([q[:, a].square().mean(-1), k[:, b].square().mean(-1)], -1)
                for a, b in rows
            )
            return x.copy_(total)

    for a, b in rows:
        norm = WholeNorm(Ranks(), weights[0][a], weights[1][b], 1e-5)
        mine = norm(q[:, a], k[:, b])
        assert torch.allclose(mine[0], rms_norm(q, weights[0], 1e-5)[:, a], atol=1e-6)
        assert torch.allclose(mine[1], rms_norm(k, weights[1], 1e-5)[:, b], atol=1e-6)


def changed(model: TinyModel, folder, **fields) -> ModelConfig:
    """The model's config, read again with fields changed."""
    config = json.loads((model.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return ModelConfig.from_folder(folder)
