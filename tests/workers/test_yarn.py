"""Rotary embeddings are those of transformers, plain and stretched by YaRN, in all families."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from loraplex.workers import ModelUnsupported
from loraplex.workers.config import ModelConfig
from loraplex.workers.layers.rope import RotaryEmbedding, inverse_frequencies
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from .test_models import TOLERANCE, requests_for
from .tiny_models import make_tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 64
SCALINGS = [
    {"rope_type": "default", "rope_theta": 1e6},
    YARN,
    YARN | {"factor": 0.5},
    YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": 1.3},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
    YARN | {"mscale": 0.707},
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 6},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling)))
@pytest.mark.parametrize("latent", [False, True])
def test_angles_are_those_of_transformers(tmp_path, scaling, latent):
    if latent:
        config = DeepseekV3Config(qk_rope_head_dim=24, rope_parameters=dict(scaling))
        reference = DeepseekV3RotaryEmbedding(config)
    else:
        config = Qwen3MoeConfig(head_dim=24, rope_parameters=dict(scaling))
        reference = Qwen3MoeRotaryEmbedding(config)
    config.save_pretrained(tmp_path)
    model = ModelConfig.from_folder(tmp_path)
    assert model.rope_dim == 24
    cpu = torch.device("cpu")
    frequencies = inverse_frequencies(model.rope_dim, model.rope_theta, model.yarn)
    rope = RotaryEmbedding(*frequencies, 400, cpu)
    positions = torch.randint(400, (50,))
    expected = reference(torch.zeros(1), positions[None])
    for mine, theirs in zip(rope.at(positions), expected, strict=True):
        assert (mine[:, 0] - theirs[0]).abs().max() <= 1e-4


def test_yarn_is_served_in_other_families(tmp_path, run, greedy):
    tiny = make_tiny_model("qwen3_moe", tmp_path)
    folder = shutil.copytree(tiny.folder, tmp_path / "yarn")
    config = json.loads((folder / "config.json").read_text())
    yarn = config["rope_parameters"] | YARN | {"original_max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn}))
    names, requests = requests_for(tiny, greedy, 1)
    engine = tiny.engine(model_path=str(folder))
    results = run(engine, requests)
    engine.close()
    tiny.folder = folder
    name = random.choice([n for n in names if n is not None])
    request = requests[names.index(name)]
    result, prompt = results[request.request_id], list(request.prompt_ids)
    with torch.no_grad():
        ids = torch.tensor([prompt + result.tokens])
        logprobs = tiny.oracle(name)(ids).logits[0].log_softmax(-1)[:-1]
    reference = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    mine = torch.tensor(result.prompt_logprobs + result.logprobs)
    assert (mine - reference).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "linear", "llama3", "longrope"])
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    raw = Qwen3MoeConfig().to_dict() | {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match=f"rope_type = '{kind}' isn't served"):
        ModelConfig.from_folder(tmp_path)
