"""A base model is known by its shapes and by a fingerprint of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from loraplex.adapter_store import BaseModel, BaseModelError, DenseTarget
from safetensors.numpy import load_file, save_file

from .peft_models import EXPERTS, HIDDEN, INTER, base_folder, base_model, fused_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder(), tmp_path / "copy"))


def test_shapes_are_those_of_the_model() -> None:
    base, model = base_model(), fused_model()
    layer = model.model.layers[0]
    for name, target in base.dense_targets.items():
        assert getattr(layer.self_attn, name).weight.shape == (target.out, target.in_)
    assert layer.mlp.experts.gate_up_proj.shape == (EXPERTS, 2 * INTER, HIDDEN)
    assert (base.num_experts, base.moe_intermediate, base.hidden) == (EXPERTS, INTER, HIDDEN)
    assert base.num_layers == len(model.model.layers)
    assert base.dense_targets["o_proj"] == DenseTarget(32, 32, "row")
    assert base.moe_layers == (0, 1)


def test_survives_json() -> None:
    assert BaseModel.from_json(base_model().to_json()) == base_model()


def test_names(folder: Path) -> None:
    base = BaseModel.from_folder(folder, "Serve-Me", accepted_names=["Org/Published-Name"])
    assert base.name == "Serve-Me"
    assert base.accepted_names == ("copy", "published-name", "serve-me")
    assert base.accepts_name("someone/PUBLISHED-name")
    assert not base.accepts_name("someone/published-name-2")


def test_fingerprint_follows_the_weights_not_the_folder(folder: Path) -> None:
    assert BaseModel.from_folder(folder).fingerprint == base_model().fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert BaseModel.from_folder(folder).fingerprint == base_model().fingerprint
    config["num_experts"] = config.pop("num_local_experts")  # as transformers 4 wrote it
    (folder / "config.json").write_text(json.dumps(config))
    assert BaseModel.from_folder(folder).fingerprint == base_model().fingerprint

    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights)
    assert BaseModel.from_folder(folder).fingerprint != base_model().fingerprint


def test_layers_without_experts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0]}))
    assert BaseModel.from_folder(folder).moe_layers == (1,)


def test_missing_and_broken_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json doesn't exist; a model folder"):
        BaseModel.from_folder(tmp_path / "nowhere")
    (weights,) = folder.glob("*.safetensors")
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(BaseModelError, match="can't be read"):
        BaseModel.from_folder(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="no \\*\\.safetensors file"):
        BaseModel.from_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "holds a list"),
        ('{"model_type": "llama"}', "'llama' isn't supported"),
        ('{"model_type": "qwen3_moe", "hidden_size": 0}', "hidden_size is 0"),
        ('{"model_type": "qwen3_moe", "hidden_size": 8}', "num_attention_heads is None"),
    ],
)
def test_broken_configs(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=message):
        BaseModel.from_folder(folder)
