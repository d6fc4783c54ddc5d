"""The dense projections that adapters may target, by model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Cut = Literal["column", "row"]
Size = Callable[[str], int]  # a positive integer of config.json by its field

_DEEPSEEK = ("deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class DenseTarget:
    """A dense projection that adapters may target. Weight shape [out, in_].

    `cut` says which dimension tensor parallelism divides: "column" cuts out, "row" cuts in_. What
    every rank computes whole (a projection to a latent) counts as "column": each takes all rows.
    """

    out: int
    in_: int
    cut: Cut


def dense_targets(config: Mapping[str, Any], size: Size) -> dict[str, DenseTarget]:
    """By name: attention's as in `self_attn.<name>`, others as in `mlp.<name>` where a layer has
    experts, and with the `mlp.` where it has none."""
    model_type, hidden = config["model_type"], size("hidden_size")
    if model_type not in _DEEPSEEK:
        targets = _grouped_query_targets(hidden, size)
        if model_type == "qwen2_moe":
            inter = size("shared_expert_intermediate_size")
            targets |= _mlp_targets("shared_expert", hidden, inter)
        return targets
    targets = _latent_targets(config, hidden, size)
    if config.get("n_shared_experts"):
        inter = size("n_shared_experts") * size("moe_intermediate_size")
        targets |= _mlp_targets("shared_experts", hidden, inter)
    if config.get("first_k_dense_replace"):
        targets |= _mlp_targets("mlp", hidden, size("intermediate_size"))
    return targets


def moe_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Indices of the layers that hold experts.

    Of the Qwen families every `decoder_sparse_step`-th, but for `mlp_only_layers`; of DeepSeek's
    all but the first.
    """
    if config["model_type"] in _DEEPSEEK:
        return tuple(range(config.get("first_k_dense_replace") or 0, layers))
    step = config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def head_dim(config: Mapping[str, Any], size: Size) -> int:
    """Of queries and keys."""
    if config["model_type"] in _DEEPSEEK:  # its `head_dim`, where it has one, is the rotated part
        return size("qk_nope_head_dim") + size("qk_rope_head_dim")
    return config.get("head_dim") or size("hidden_size") // size("num_attention_heads")


def _grouped_query_targets(hidden: int, size: Size) -> dict[str, DenseTarget]:
    q = size("num_attention_heads") * size("head_dim")
    kv = size("num_key_value_heads") * size("head_dim")
    return {
        "q_proj": DenseTarget(q, hidden, "column"),
        "k_proj": DenseTarget(kv, hidden, "column"),
        "v_proj": DenseTarget(kv, hidden, "column"),
        "o_proj": DenseTarget(hidden, q, "row"),
    }


def _latent_targets(config: Mapping[str, Any], hidden: int, size: Size) -> dict[str, DenseTarget]:
    """Without kv_b_proj, which is folded into the queries and outputs of all adapters alike."""
    heads = size("num_attention_heads")
    q = heads * size("head_dim")
    latent = size("kv_lora_rank") + size("qk_rope_head_dim")
    if config.get("q_lora_rank"):
        rank = size("q_lora_rank")
        targets = {
            "q_a_proj": DenseTarget(rank, hidden, "column"),
            "q_b_proj": DenseTarget(q, rank, "column"),
        }
    else:
        targets = {"q_proj": DenseTarget(q, hidden, "column")}
    return targets | {
        "kv_a_proj_with_mqa": DenseTarget(latent, hidden, "column"),
        "o_proj": DenseTarget(hidden, heads * size("v_head_dim"), "row"),
    }


def _mlp_targets(module: str, hidden: int, inter: int) -> dict[str, DenseTarget]:
    return {
        f"{module}.gate_proj": DenseTarget(inter, hidden, "column"),
        f"{module}.up_proj": DenseTarget(inter, hidden, "column"),
        f"{module}.down_proj": DenseTarget(hidden, inter, "row"),
    }
