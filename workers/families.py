"""What differs between the `config.json` of one served model family and another. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .deepseek_config import unserved_deepseek_options


@dataclass(frozen=True)
class Family:
    """How a family's config is read.

    Attributes:
        expert_size_field: holds the intermediate size of one expert.
        rope_theta: where the config has none.
        norm_topk_prob: where the config has none.
        qkv_bias: of q, k and v, where the config says nothing.
        shared_expert: whether every token also goes through an expert of its own size.
        windowed: `sliding_window` counts without a switch (`use_sliding_window`) beside it.
        latent: multi-head latent attention, and DeepSeek's experts, routing and dense layers.
    """

    expert_size_field: str = "moe_intermediate_size"
    rope_theta: float = 10000.0
    norm_topk_prob: bool = False
    qkv_bias: bool = False
    shared_expert: bool = False
    windowed: bool = False
    latent: bool = False


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(),
    "olmoe": Family(expert_size_field="intermediate_size", windowed=True),
    "mixtral": Family(
        expert_size_field="intermediate_size",
        rope_theta=1e6,
        norm_topk_prob=True,
        windowed=True,
    ),
    "qwen2_moe": Family(qkv_bias=True, shared_expert=True),
    "deepseek_v2": Family(latent=True),
    "deepseek_v3": Family(norm_topk_prob=True, latent=True),
}


def rope_parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope parameters of a config, wherever it has them."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def unserved_options(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Options of a config that would change the result and aren't served, with their values."""
    rope = rope_parameters(raw)
    dense_step = raw.get("decoder_sparse_step", 1)
    values = {
        "rope_type": kind if (kind := rope_type(rope)) not in ("default", "yarn") else None,
        "partial_rotary_factor": _unless(rope.get("partial_rotary_factor"), 1),
        "attention_bias": raw.get("attention_bias"),
        "clip_qkv": raw.get("clip_qkv"),
        "use_sliding_window": raw.get("use_sliding_window"),
        "mlp_only_layers": raw.get("mlp_only_layers"),
        "decoder_sparse_step": _unless(dense_step, 1),
        "hidden_act": _unless(raw.get("hidden_act"), "silu"),
    }
    unserved = {name: value for name, value in values.items() if value}
    return unserved | (unserved_deepseek_options(raw) if family.latent else {})


def _unless(value: Any, usual: Any) -> Any:
    return None if value == usual else value
