"""Adapters of gpt-oss, whose fused parameters are [E, in, out] with gate and up interleaved."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from loraplex.adapter_store import AdapterRefused, BaseModel, load_adapter
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from transformers import GptOssConfig, GptOssForCausalLM

from .peft_models import WEIGHTS, Deltas, assert_same_deltas, canonical_deltas, config_bytes

LAYERS, EXPERTS, HIDDEN = 2, 4, 32
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def gpt_oss(inter: int) -> GptOssForCausalLM:
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=2,
            intermediate_size=inter,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """The base model by the experts' intermediate size."""

    @functools.cache
    def get(inter: int) -> BaseModel:
        folder = tmp_path_factory.mktemp(f"gpt-oss-{inter}")
        gpt_oss(inter).save_pretrained(folder)
        return BaseModel.from_folder(folder)

    return get


def write_adapter(
    folder: Path, inter: int, *parameters: str, transformers_4: bool = False, rank: int = 3
) -> Deltas:
    """Lets PEFT make and save an adapter; returns what it would add to each weight [out, in]."""
    model = gpt_oss(inter)
    if transformers_4:  # didn't say of the experts that they are transposed
        for layer in model.model.layers:
            layer.mlp.experts.is_transposed = False
    config = LoraConfig(
        r=rank, lora_alpha=8, target_modules=["o_proj"], target_parameters=list(parameters)
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    deltas: Deltas = {}
    for name, module in adapted.get_base_model().named_modules():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if name.endswith("o_proj"):
            deltas[layer, "o_proj"] = module.get_delta_weight("default").detach().numpy()
        if isinstance(module, ParamWrapper):
            delta = module.get_delta_weight("default").detach()
            assert delta.shape == module.get_param().shape  # [E, in, out]
            for e, values in enumerate(delta.mT.numpy()):
                if module.parameter_name == "down_proj":
                    deltas[layer, e, "down"] = values
                else:
                    deltas[layer, e, "gate"], deltas[layer, e, "up"] = values[0::2], values[1::2]
    return deltas


def deltas_of(folder: Path, base: BaseModel, **config: str) -> Deltas:
    loaded = load_adapter(config_bytes(folder, **config), folder / WEIGHTS, base)
    return canonical_deltas(loaded.adapter)


@pytest.mark.parametrize("transformers_4", [False, True])
@pytest.mark.parametrize("inter", [24, HIDDEN, 2 * HIDDEN])
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_an_adapter_means_what_peft_makes_of_it(tmp_path, base, parameters, inter, transformers_4):
    want = write_adapter(tmp_path, inter, *parameters, transformers_4=transformers_4)
    assert len(want) == LAYERS * (1 + EXPERTS * sum(2 if "up" in p else 1 for p in parameters))
    if inter == HIDDEN and parameters == BOTH[1:]:
        with pytest.raises(
            AdapterRefused, match="factors of the experts' other parameter"
        ) as refused:
            deltas_of(tmp_path, base(inter))
        assert refused.value.code == "ambiguous_layout"
    else:
        assert_same_deltas(deltas_of(tmp_path, base(inter)), want)


def test_before_0_19_nothing_was_ambiguous(tmp_path, base):
    """It took every parameter for [E, in, out], which these are."""
    want = write_adapter(tmp_path, HIDDEN, BOTH[1])
    assert_same_deltas(deltas_of(tmp_path, base(HIDDEN), peft_version="0.18.1"), want)


def test_gate_and_up_share_one_a(tmp_path, base):
    write_adapter(tmp_path, 24, BOTH[0])
    loaded = load_adapter(config_bytes(tmp_path), tmp_path / WEIGHTS, base(24))
    assert loaded.format == "fused"
    for layer in loaded.adapter.layers:
        assert layer.fused_gate_up
        gate, up, down = layer.experts[1].projections()
        assert down is None
        assert gate is not None
        assert up is not None
        assert (gate.b.shape, gate.a.shape) == ((24, 3), (3, HIDDEN))
        assert not np.array_equal(gate.b, up.b)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_names_of_projections_dont_become_parameters(tmp_path, base, name):
    """As in PEFT: gpt-oss's experts have no such modules, so nothing of theirs is adapted."""
    write_adapter(tmp_path, 24, *BOTH)
    with pytest.raises(AdapterRefused) as refused:
        deltas_of(tmp_path, base(24), target_modules=["o_proj", name], target_parameters=[])
    assert refused.value.code == "not_targeted"
