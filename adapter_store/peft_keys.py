"""Tensor names of a PEFT adapter: which factor of which projection each one is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .base_model import BaseModel
from .errors import AdapterRefused
from .quoting import safe_key, show

Side = Literal["A", "B"]

# Unfused expert projections, with Mixtral's names.
_PROJECTIONS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}

_KEY = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<module>(?:model\.)?layers\.(?P<layer>[0-9]{1,5})\.(?P<rest>[A-Za-z0-9_.]{1,200}))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_DENSE = re.compile(r"self_attn\.(?P<target>[a-z_]+)|mlp\.(?P<shared>shared_expert\.[a-z_]+)")
_EXPERT = re.compile(
    r"(?:mlp|block_sparse_moe)\.experts\.(?P<expert>[0-9]{1,6})"
    rf"\.(?P<projection>{'|'.join(_PROJECTIONS)})"
)
_FUSED = re.compile(r"(?:mlp|block_sparse_moe)\.experts(?P<inner>\.base_layer)?")
_ROUTER = re.compile(r"(?:mlp|block_sparse_moe)\.(?:gate|router)")

# Parts of names that say why a tensor is no factor that is served.
_TELLING = {
    "lora_magnitude_vector": ("unsupported_feature", "DoRA isn't served"),
    "lora_embedding_": ("unsupported_feature", "LoRA on embeddings isn't served"),
    "modules_to_save": ("unsupported_feature", "fully trained modules aren't served"),
    ".bias": ("unsupported_feature", "biases aren't served"),
    "lm_head": ("unsupported_target", "adapting lm_head isn't served"),
    "embed_tokens": ("unsupported_target", "adapting the embeddings isn't served"),
    "trainable_tokens": ("unsupported_feature", "trained token embeddings aren't served"),
}


@dataclass(frozen=True)
class DenseSite:
    """A projection of attention or of a shared expert.

    `module` is its full name, as PEFT matches it; `target` its name in the base's dense targets.
    """

    layer: int
    module: str
    target: str


@dataclass(frozen=True)
class ExpertSite:
    """One projection ("gate", "up", "down") of one expert."""

    layer: int
    module: str
    expert: int
    projection: str


@dataclass(frozen=True)
class FusedSite:
    """A fused parameter of a layer's experts; `module` names the experts.

    PEFT nests its wrappers: with two parameters adapted, the first one's key has `.base_layer`
    (`inner`). Which parameter a key stands for is only known from the config.
    """

    layer: int
    module: str
    inner: bool


Site = DenseSite | ExpertSite | FusedSite


def parse_key(name: str, base: BaseModel) -> tuple[Site, Side]:
    """Reads a tensor's name.

    Raises:
        AdapterRefused: "unknown_key", "unsupported_target" or "unsupported_feature".
    """
    match = _KEY.fullmatch(name)
    if match is None:
        raise _refusal(name)
    layer, module, rest = int(match["layer"]), match["module"], match["rest"]
    if layer >= base.num_layers:
        raise _unknown(name, f"{base.name} has layers 0 to {base.num_layers - 1}")
    side: Side = "A" if match["side"] == "A" else "B"
    dense = _DENSE.fullmatch(rest)
    if dense and (target := dense["target"] or dense["shared"]) in base.dense_targets:
        if dense["shared"]:
            _check_moe_layer(name, layer, base)
        return DenseSite(layer, module, target), side
    if fused := _FUSED.fullmatch(rest):
        _check_moe_layer(name, layer, base)
        module = module.removesuffix(".base_layer")
        return FusedSite(layer, module, inner=fused["inner"] is not None), side
    if expert := _EXPERT.fullmatch(rest):
        _check_moe_layer(name, layer, base)
        number = int(expert["expert"])
        if number >= base.num_experts:
            raise _unknown(name, f"{base.name} has experts 0 to {base.num_experts - 1}")
        return ExpertSite(layer, module, number, _PROJECTIONS[expert["projection"]]), side
    if _ROUTER.fullmatch(rest):
        raise _unsupported(name, "adapting the router isn't served")
    if rest == "mlp.shared_expert_gate":
        raise _unsupported(name, "adapting the gate of the shared expert isn't served")
    served = ", ".join(base.dense_targets)
    raise _unsupported(
        name, f"{rest} isn't served; adapters may target {served} and the experts' projections"
    )


def _check_moe_layer(name: str, layer: int, base: BaseModel) -> None:
    if layer not in base.moe_layers:
        raise _unsupported(name, f"layer {layer} of {base.name} has no experts")


def _refusal(name: str) -> AdapterRefused:
    for part, (code, problem) in _TELLING.items():
        if part in name:
            return AdapterRefused(code, f"tensor {show(name)}: {problem}", safe_key(name))
    return _unknown(
        name,
        "it isn't the name of a LoRA factor, such as "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    )


def _unknown(name: str, problem: str) -> AdapterRefused:
    return AdapterRefused("unknown_key", f"tensor {show(name)}: {problem}", safe_key(name))


def _unsupported(name: str, problem: str) -> AdapterRefused:
    return AdapterRefused("unsupported_target", f"tensor {show(name)}: {problem}", safe_key(name))
