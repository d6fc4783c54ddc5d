"""What differs between the `config.json` of one served model family and another. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
    """

    expert_size_field: str = "moe_intermediate_size"
    rope_theta: float = 10000.0
    norm_topk_prob: bool = False
    qkv_bias: bool = False
    shared_expert: bool = False
    windowed: bool = False


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
}


def unserved_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a config that would change the result and aren't served, with their values."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    dense_step = raw.get("decoder_sparse_step", 1)
    values = {
        "rope_type": _unless(rope.get("rope_type", rope.get("type")), "default"),
        "partial_rotary_factor": _unless(rope.get("partial_rotary_factor"), 1),
        "attention_bias": raw.get("attention_bias"),
        "clip_qkv": raw.get("clip_qkv"),
        "use_sliding_window": raw.get("use_sliding_window"),
        "mlp_only_layers": raw.get("mlp_only_layers"),
        "decoder_sparse_step": _unless(dense_step, 1),
        "hidden_act": _unless(raw.get("hidden_act"), "silu"),
    }
    return {name: value for name, value in values.items() if value}


def _unless(value: Any, usual: Any) -> Any:
    return None if value == usual else value
