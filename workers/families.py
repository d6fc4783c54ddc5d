"""What differs between the `config.json` of one served model family and another. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .deepseek_config import unserved_deepseek_options


@dataclass(frozen=True)
class Family:
    """How a family's config is read.

    Attributes:
        expert_size_field: holds the intermediate size of one expert.
        rope_theta: where the config has none.
        rope: other rope parameters, where the config has none at all.
        norm_topk_prob: where the config has none.
        qkv_bias: of q, k and v, where the config says nothing.
        attention_bias: of q, k, v and o, unless the config says no. Refused in other families.
        shared_expert: whether every token also goes through an expert of its own size.
        clamped_swiglu: experts have gpt-oss's activation.
        quantisations: values of `quantization_config.quant_method` that can be read.
        windows: which layers `sliding_window` is for: "all" of them; "switched": all, if
            `use_sliding_window` says so; "switched some": then those that `layer_types` names;
            "some": those always.
        sliding_window: where the config has none.
        latent: multi-head latent attention, and DeepSeek's experts, routing and dense layers.
    """

    expert_size_field: str = "moe_intermediate_size"
    rope_theta: float = 10000.0
    rope: Mapping[str, Any] = field(default_factory=dict)
    norm_topk_prob: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    shared_expert: bool = False
    clamped_swiglu: bool = False
    quantisations: frozenset[str] = frozenset()
    windows: Literal["all", "switched", "switched some", "some"] = "all"
    sliding_window: int | None = None
    latent: bool = False


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(windows="switched", sliding_window=4096, quantisations=frozenset({"fp8"})),
    "olmoe": Family(expert_size_field="intermediate_size"),
    "mixtral": Family(
        expert_size_field="intermediate_size",
        rope_theta=1e6,
        norm_topk_prob=True,
    ),
    "qwen2_moe": Family(
        qkv_bias=True, shared_expert=True, windows="switched some", sliding_window=4096
    ),
    "gpt_oss": Family(
        expert_size_field="intermediate_size",
        rope_theta=150000.0,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        norm_topk_prob=True,  # softmax over the chosen logits is softmax over all, renormalised
        attention_bias=True,
        clamped_swiglu=True,
        quantisations=frozenset({"mxfp4"}),
        windows="some",
        sliding_window=128,
    ),
    "deepseek_v2": Family(latent=True, quantisations=frozenset({"fp8"})),
    "deepseek_v3": Family(norm_topk_prob=True, latent=True, quantisations=frozenset({"fp8"})),
}

FP8_BLOCK = 128  # rows, and columns, of FP8 weights that share a scale; `kernels` says so too
_FP8_FORMAT = {
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
}


def rope_parameters(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The rope parameters of a config, wherever it has them."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or family.rope
    if original := raw.get("original_max_position_embeddings"):
        return {**rope, "original_max_position_embeddings": original}
    return rope


def rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def layer_windows(raw: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """How many tokens each layer attends to, the current one included; None: all.

    Raises:
        ValueError: `layer_types` or `sliding_window` can't be what it is.
    """
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window", family.sliding_window)
    switched_off = family.windows.startswith("switched") and not raw.get("use_sliding_window")
    if window is None or switched_off:
        return (None,) * layers
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window = {window!r} must be a positive number of tokens")
    if family.windows in ("all", "switched"):
        return (window,) * layers
    # Where the list is missing, every second layer; in Qwen2-MoE of the first ones only.
    most = raw.get("max_window_layers", 28) if family.windows == "switched some" else layers
    types = raw.get("layer_types") or [
        "sliding_attention" if n % 2 == 0 and n < most else "full_attention" for n in range(layers)
    ]
    known = {"sliding_attention": window, "full_attention": None}
    if len(types) != layers or not set(types) <= known.keys():
        raise ValueError(
            f"layer_types must say {' or '.join(known)} for each of {layers} layers, got {types}"
        )
    return tuple(known[t] for t in types)


def unserved_options(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Options of a config that would change the result and aren't served, with their values."""
    rope = rope_parameters(raw, family)
    dense_step = raw.get("decoder_sparse_step", 1)
    kind = rope_type(rope)
    values = {
        "rope_type": None if kind in ("default", "yarn") else kind,
        "partial_rotary_factor": _unless(
            rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")), 1
        ),
        "attention_bias": None if family.attention_bias else raw.get("attention_bias"),
        "clip_qkv": raw.get("clip_qkv"),
        "mlp_only_layers": raw.get("mlp_only_layers"),
        "decoder_sparse_step": _unless(dense_step, 1),
        "hidden_act": _unless(raw.get("hidden_act"), "silu"),
    }
    unserved = {name: value for name, value in values.items() if value}
    return unserved | (unserved_deepseek_options(raw) if family.latent else {})


def quant_method(raw: Mapping[str, Any]) -> str | None:
    """How the checkpoint's weights are quantised; None: they aren't."""
    quantisation = raw.get("quantization_config")
    return quantisation.get("quant_method", "unknown") if quantisation else None


def unserved_fp8_format(raw: Mapping[str, Any]) -> str | None:
    """What an FP8 checkpoint's `quantization_config` has that can't be read, and what can."""
    quantisation = raw["quantization_config"]
    for name, served in _FP8_FORMAT.items():
        # Without a block size there is one scale a tensor.
        found = quantisation.get(name, None if name == "weight_block_size" else served)
        if found != served:
            return f"{name} = {found!r}; FP8 weights are served with {served!r}"
    return None


def _unless(value: Any, usual: Any) -> Any:
    return None if value == usual else value
