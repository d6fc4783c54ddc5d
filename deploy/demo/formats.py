"""Writes trained adapters in the forms that are found in the wild.

PEFT trains experts as one fused 3-D parameter. Its two factors have different layouts: A is
expert-major, `A.view(E, r, in)`; B is rank-major, `B.view(out, r, E)`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file, save_file
from tenants import ATTENTION, BASE_NAME, EXPERT_PROJECTIONS

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_TRAINED_AS = "default"  # PEFT's name for a model's first adapter


def round_to_bf16(model: PeftModel) -> None:
    """Rounds the LoRA factors in place, so that what is evaluated is what gets saved."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".lora_" in name:
                param.copy_(param.to(torch.bfloat16))


def save_as_trained(model: PeftModel, folder: Path) -> None:
    """Writes PEFT's own keys and config, weights in bf16.

    Args:
        model: after `round_to_bf16`, so nothing is lost here.
        folder: made when missing.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    _write(folder, state, model.peft_config[_TRAINED_AS])


def save_per_expert(model: PeftModel, folder: Path) -> None:
    """Writes one key pair per expert and projection, as adapters of before fused experts have.

    A fused gate_up factor pair splits exactly: gate and up share its A, and each takes its half of
    B. Ranks and alpha stay the same, so the config is plain.

    Raises:
        ValueError: the model has ranks or scales that differ between projections.
    """
    trained: LoraConfig = model.peft_config[_TRAINED_AS]
    if trained.rank_pattern or trained.alpha_pattern:
        raise ValueError("the per-expert form is written for adapters of one rank and alpha only")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {key: value for key, value in state.items() if ".mlp.experts." not in key}
    for layer, wrappers in _expert_wrappers(model).items():
        for parameter, wrapper in wrappers.items():
            A_ERI, B_EOR = _expert_factors(wrapper)
            if parameter == "gate_up_proj":
                gate, up = B_EOR.chunk(2, dim=1)
                parts = {"gate_proj": gate, "up_proj": up}
            else:
                parts = {"down_proj": B_EOR}
            for projection, part_EOR in parts.items():
                for expert in range(wrapper.num_experts):
                    prefix = f"base_model.model.{layer}.{expert}.{projection}"
                    state[f"{prefix}.lora_A.weight"] = A_ERI[expert]
                    state[f"{prefix}.lora_B.weight"] = part_EOR[expert]
    config = copy.deepcopy(trained)
    config.target_modules = [*ATTENTION, *EXPERT_PROJECTIONS]
    config.target_parameters = None
    _write(folder, state, config)


def check_per_expert(model: PeftModel, folder: Path) -> float:
    """Compares every delta weight of the written per-expert form with the trained model's.

    Returns:
        The largest difference over all experts, relative to the largest delta weight.
    """
    state = {key: value.float() for key, value in load_file(folder / WEIGHTS).items()}
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    worst = largest = 0.0
    for layer, wrappers in _expert_wrappers(model).items():
        for parameter, wrapper in wrappers.items():
            names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
            want_EOI = wrapper.get_delta_weight(_TRAINED_AS).detach().float().cpu()
            for expert in range(wrapper.num_experts):
                prefix = f"base_model.model.{layer}.{expert}"
                got = torch.cat(
                    [
                        scale
                        * state[f"{prefix}.{name}.lora_B.weight"]
                        @ state[f"{prefix}.{name}.lora_A.weight"]
                        for name in names
                    ]
                )
                worst = max(worst, (got - want_EOI[expert]).abs().max().item())
                largest = max(largest, want_EOI[expert].abs().max().item())
    return worst / largest


def _expert_wrappers(model: PeftModel) -> dict[str, dict[str, ParamWrapper]]:
    """PEFT's wrappers of expert parameters, by the experts' module name, then parameter name."""
    found: dict[str, dict[str, ParamWrapper]] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            layer = name.replace(".base_layer", "")
            found.setdefault(layer, {})[module.parameter_name] = module
    return found


def _expert_factors(wrapper: ParamWrapper) -> tuple[torch.Tensor, torch.Tensor]:
    """A as [E, r, in] and B as [E, out, r]."""
    A = wrapper.lora_A[_TRAINED_AS].weight
    B = wrapper.lora_B[_TRAINED_AS].weight
    rank, experts = wrapper.r[_TRAINED_AS], wrapper.num_experts
    return A.view(experts, rank, -1), B.view(-1, rank, experts).permute(2, 0, 1)


def _write(folder: Path, state: dict[str, torch.Tensor], config: LoraConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned because gate and up share their A, and safetensors refuses shared memory.
    weights = {
        key: value.detach().to("cpu", torch.bfloat16).contiguous().clone()
        for key, value in state.items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    published = copy.deepcopy(config)
    published.inference_mode = True
    # PEFT puts in the folder that the base was loaded from, and keeps targets as unordered sets.
    published.base_model_name_or_path = BASE_NAME
    for field in ("target_modules", "target_parameters"):
        if (targets := getattr(published, field)) is not None:
            setattr(published, field, sorted(targets))
    published.save_pretrained(folder)
