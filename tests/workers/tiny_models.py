"""Tiny random models of the served families, saved by transformers, and adapters saved by PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.workers import AdapterRef, Engine, EngineConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from .conftest import TENANT, LocalPacks

VOCAB, LAYERS, HIDDEN, INTER, SHARED, EXPERTS = 128, 2, 64, 32, 48, 6
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, num_experts=EXPERTS, moe_intermediate_size=INTER, head_dim=24, norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**_SIZES, num_experts=EXPERTS, intermediate_size=INTER),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=EXPERTS, intermediate_size=INTER),
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES,
        num_experts=EXPERTS,
        moe_intermediate_size=INTER,
        shared_expert_intermediate_size=SHARED,
    ),
    "gpt_oss": GptOssConfig(
        **_SIZES,
        num_local_experts=EXPERTS,
        intermediate_size=INTER,
        head_dim=24,
        sliding_window=7,
        swiglu_alpha=1.3,
        swiglu_limit=1.5,  # of random weights' activations, some are clamped
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_MODULES = dict.fromkeys(CONFIGS, ("mlp.experts", PROJECTIONS))
EXPERT_MODULES["mixtral"] = ("block_sparse_moe.experts", ("w1", "w3", "w2"))


@dataclass
class TinyModel:
    """A saved model, its adapters (PEFT folders) by name, and their packs."""

    family: str
    folder: Path
    base: BaseModel
    adapters: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, AdapterRef] = field(default_factory=dict)
    packs: LocalPacks = field(default_factory=LocalPacks)

    def config(self, **changes: Any) -> EngineConfig:
        fields = {"model_path": str(self.folder), "base_fingerprint": self.base.fingerprint}
        return EngineConfig(**{**fields, "pool_bytes": 8 << 20, "kv_tokens": 2048, **changes})

    def engine(self, **changes: Any) -> Engine:
        return Engine(self.config(**changes), self.packs)

    def oracle(self, adapter: str | None) -> nn.Module:
        """The model as transformers and PEFT run it."""
        model = _load(self.folder)
        if adapter == "per expert" and self.family in ("qwen2_moe", "gpt_oss"):
            _merge(model, self.adapters[adapter])  # PEFT can't load these for fused experts
        elif adapter is not None:
            model = peft.PeftModel.from_pretrained(model, self.adapters[adapter])
        return model.eval()


def make_tiny_model(family: str, folder: Path) -> TinyModel:
    """Saves the model, and one adapter of each format that PEFT knows for it."""
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms begin as 1 and biases as 0, which would prove little.
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    # All experts of a layer in two tensors, under the names that transformers 5 has in memory.
    model.save_pretrained(folder / "fused", save_original_format=False)

    tiny = TinyModel(family, folder / "model", BaseModel.from_folder(folder / "model"))
    projections = EXPERT_MODULES[family][1]
    formats: dict[str, dict[str, Any]] = {
        "attention": {"target_modules": ATTENTION},
        "fused parameters": {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "use_rslora": True,
        },
        "expert modules": {"target_modules": [*ATTENTION, *projections]},
    }
    if family == "qwen2_moe":
        # Here PEFT leaves module names as they are, so "expert modules" is the shared expert alone.
        formats["shared expert and fused parameters"] = {
            "target_modules": list(PROJECTIONS),
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
        formats["shared expert as parameters"] = {
            "target_modules": ["k_proj"],
            "target_parameters": [f"shared_expert.{name}.weight" for name in PROJECTIONS],
        }
    if family == "gpt_oss":
        # Its experts have no modules to name.
        del formats["expert modules"]
        formats["attention and fused parameters"] = {
            "target_modules": ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"gate_up_proj": 12, "down_proj": 5},
        }
        formats["down alone"] = {
            "target_modules": ["k_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
        }
    for name, config in formats.items():
        _save_adapter(tiny, folder / "adapters" / name, config)
    _save_per_expert(tiny, folder / "adapters" / "per expert")
    for name, source in tiny.adapters.items():
        path = folder / f"{name}.pack"
        config = (source / "adapter_config.json").read_bytes()
        info = make_pack(config, source / "adapter_model.safetensors", tiny.base, path)
        tiny.refs[name] = AdapterRef(TENANT, info.digest)
        tiny.packs.paths[tiny.refs[name].key] = path
    return tiny


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


def _save_adapter(tiny: TinyModel, folder: Path, config: dict[str, Any]) -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    model = peft.get_peft_model(_load(tiny.folder), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny.adapters[folder.name] = folder


def _save_per_expert(tiny: TinyModel, folder: Path) -> None:
    """As PEFT wrote it over transformers 4, whose experts were modules."""
    experts, (gate, up, down) = EXPERT_MODULES[tiny.family]
    rank, tensors = 4, {}
    sizes = {f"{experts}.{e}": INTER for e in range(EXPERTS)}
    if tiny.family == "qwen2_moe":
        sizes["mlp.shared_expert"] = SHARED
    for layer, (expert, inter) in product(range(LAYERS), sizes.items()):
        for name, in_, out in ((gate, HIDDEN, inter), (up, HIDDEN, inter), (down, inter, HIDDEN)):
            module = f"base_model.model.model.layers.{layer}.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.15 * torch.randn(rank, in_)
            tensors[f"{module}.lora_B.weight"] = 0.15 * torch.randn(out, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": [gate, up, down],
        "base_model_name_or_path": str(tiny.folder),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    tiny.adapters[folder.name] = folder


def _merge(model: nn.Module, folder: Path) -> None:
    """Adds what an adapter of `_save_per_expert` means to the model's fused weights."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in (k for k in tensors if ".lora_A." in k):
        delta = 2 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]  # alpha / rank = 2
        path, _, name = key[len("base_model.model.") : -len(".lora_A.weight")].rpartition(".")
        if path.endswith("shared_expert"):
            weight = model.get_parameter(f"{path}.{name}.weight").data
        else:
            experts, _, number = path.rpartition(".")
            fused = "down_proj" if name == "down_proj" else "gate_up_proj"
            weight = model.get_parameter(f"{experts}.{fused}").data[int(number)]
            if model.config.model_type == "gpt_oss":
                weight = weight.T
                gate, up = weight[0::2], weight[1::2]
            else:
                gate, up = weight[:INTER], weight[INTER:]
            if fused == "gate_up_proj":
                weight = gate if name == "gate_proj" else up
        weight.add_(delta)
