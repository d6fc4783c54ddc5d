"""Rotary frequencies against transformers', and what a config's rope parameters are read as."""

from __future__ import annotations

import json
import random

import pytest
import torch
from loraplex.workers.config import ModelConfig
from loraplex.workers.families import FAMILIES, rope_parameters, rope_type
from loraplex.workers.layers.rope import RotaryEmbedding, inverse_frequencies
from loraplex.workers.layers.rope_parameters import Yarn, yarn_mscale
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

ORIGINAL = "original_max_position_embeddings"
GPT_OSS = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, ORIGINAL: 4096}
CASES = {
    "gpt-oss": GPT_OSS,
    "Qwen3 at four times its context": {"factor": 4.0, ORIGINAL: 32768},
    "mscale and mscale_all_dim": {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7,
                                  ORIGINAL: 4096},
    "mscale alone says nothing": {"factor": 40, "mscale": 1.3, ORIGINAL: 4096},
    "attention_factor": {"factor": 8.0, "attention_factor": 1.25, "mscale": 1, "mscale_all_dim": 2,
                         ORIGINAL: 1024},
    "a factor that shrinks": {"factor": 0.5, ORIGINAL: 2048},
    "one point between the betas": {"factor": 8.0, "beta_fast": 2.0, "beta_slow": 2.0,
                                    "truncate": False, ORIGINAL: 2048},
    "short context": {"factor": 16.0, "beta_fast": 64, "beta_slow": 0.5, ORIGINAL: 32},
    "no factor": {"factor": None, ORIGINAL: 1000},
    "no original context": {"factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_yarn_is_what_transformers_makes_of_it(case):
    dim, theta = 2 * random.randrange(4, 65), random.uniform(1e3, 1e6)
    config = Qwen3MoeConfig(
        head_dim=dim,
        max_position_embeddings=32000,
        rope_parameters={"rope_type": "yarn", "rope_theta": theta, **CASES[case]},
    )
    want, want_scaling = ROPE_INIT_FUNCTIONS["yarn"](config)
    raw = config.to_dict()
    rope = rope_parameters(raw, FAMILIES["qwen3_moe"])
    assert rope_type(rope) == "yarn"
    yarn = Yarn.from_parameters(rope, raw["max_position_embeddings"])
    got, scaling = inverse_frequencies(dim, theta, yarn)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
    assert scaling == pytest.approx(want_scaling)


def test_gpt_oss_rotates_as_transformers_does():
    config = GptOssConfig(
        rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, **GPT_OSS}
    )  # its context is 131072
    positions = torch.randint(0, 131072, (40,))
    cos, sin = GptOssRotaryEmbedding(config)(torch.zeros(1), positions[None])  # [1, T, D / 2]
    yarn = Yarn.from_parameters(config.rope_parameters, config.max_position_embeddings)
    frequencies, scaling = inverse_frequencies(config.head_dim, 150000.0, yarn)
    rope = RotaryEmbedding(frequencies, scaling, 131072, torch.device("cpu"))
    for mine, want in zip(rope.at(positions), (cos, sin), strict=True):
        torch.testing.assert_close(mine[:, 0], torch.cat([want[0], want[0]], -1))


def test_the_default_type_has_plain_frequencies():
    got, scaling = inverse_frequencies(10, 1e4)
    assert scaling == 1
    torch.testing.assert_close(got, torch.tensor([1e4 ** (-i / 5) for i in range(5)]))


def test_mscale_grows_with_the_factor_from_1():
    assert yarn_mscale(0.5) == yarn_mscale(1.0) == 1
    assert yarn_mscale(40, 0.707) == pytest.approx(1 + 0.0707 * 3.688879454)


def test_a_folders_config_is_read_in_the_older_spelling_too(tmp_path):
    config = Qwen3MoeConfig(max_position_embeddings=8192).to_dict()
    del config["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config |= {"rope_theta": 5e5, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_folder(tmp_path)
    assert model.rope_theta == 5e5
    assert model.yarn == Yarn(4.0, 2048, attention_scaling=yarn_mscale(4.0))
