"""Sliding windows of every family against transformers, with chunks and cached prefixes."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from loraplex.workers import Engine, EngineConfig, ModelFilesInvalid
from loraplex.workers.config import ModelConfig
from loraplex.workers.families import FAMILIES, layer_windows
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2MoeConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.olmoe import modeling_olmoe

from .conftest import LocalPacks
from .tiny_models import CONFIGS, LAYERS, VOCAB

WINDOW = 9
TYPES = ["full_attention", "sliding_attention"]
CASES = {
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": TYPES},
    "gpt_oss": {"layer_types": TYPES},
}


def write_config(folder, raw):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def logprobs_of(folder, prompts, run, greedy):
    """Tokens and logprobs of each prompt, asked twice: the second time most of it is cached."""
    engine = Engine(EngineConfig(str(folder), max_batch_tokens=13, kv_tokens=2048), LocalPacks())
    first = run(engine, [greedy(str(i), p, prompt_logprobs=0) for i, p in enumerate(prompts)])
    second = run(engine, [greedy(str(i), p) for i, p in enumerate(prompts)])
    hits = engine.report().prefix_hit_tokens
    engine.close()
    assert hits > 0
    for key, result in second.items():
        assert result.tokens == first[key].tokens
        assert result.logprobs == pytest.approx(first[key].logprobs, abs=1e-4)
    return [first[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize("family", CASES)
def test_texts_longer_than_the_window(family, tmp_path, monkeypatch, run, greedy):
    torch.set_num_threads(1)
    if family == "olmoe":  # transformers leaves its window to flash attention
        monkeypatch.setattr(modeling_olmoe, "create_causal_mask", create_sliding_window_causal_mask)
    fields = {"sliding_window": WINDOW, **CASES[family]}
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **fields})
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model.save_pretrained(tmp_path / "model")
    prompts = [[random.randrange(VOCAB) for _ in range(n)] for n in (5, 9, 24, 61)]
    results = logprobs_of(tmp_path / "model", prompts, run, greedy)

    # The same weights without the window, to see that it matters.
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["sliding_window"] == WINDOW
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw | {"sliding_window": 200}))
    wide = logprobs_of(tmp_path / "model", prompts, run, greedy)

    for prompt, result, without in zip(prompts, results, wide, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + result.tokens])
            logprobs = model(ids).logits[0].log_softmax(-1)[:-1]
        assert result.tokens == logprobs[len(prompt) - 1 :].argmax(-1).tolist()
        reference = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        assert (mine - reference).abs().max() <= 1e-4
        seen = torch.tensor(result.prompt_logprobs) - torch.tensor(without.prompt_logprobs)
        # Row i predicts token i + 1 from tokens 0 to i, which fit into the window up to WINDOW - 1.
        assert (seen[:WINDOW].abs() <= 1e-4).all()
        if len(prompt) > 2 * WINDOW:
            assert seen[WINDOW:].abs().max() > 1e-2


def windows(family, **raw):
    return layer_windows({"num_hidden_layers": 4, **raw}, FAMILIES[family])


def test_switched_off_or_absent_windows_are_none():
    off = {"sliding_window": 5, "use_sliding_window": False}
    for family, raw in (
        ("mixtral", {}), ("mixtral", {"sliding_window": None}), ("olmoe", {}),
        ("qwen3_moe", off), ("qwen2_moe", off), ("gpt_oss", {"sliding_window": None}),
    ):  # fmt: skip
        assert windows(family, **raw) == (None,) * 4


@pytest.mark.parametrize("most", [0, 1, 3, 28])
def test_without_layer_types_qwen2_moe_has_transformers_windows(most):
    raw = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": most}
    types = Qwen2MoeConfig(num_hidden_layers=4, **raw).layer_types
    want = tuple(5 if t == "sliding_attention" else None for t in types)
    assert windows("qwen2_moe", **raw) == want


def test_without_layer_types_every_second_layer_of_gpt_oss_has_a_window(tmp_path):
    assert windows("gpt_oss") == (128, None, 128, None)
    raw = GptOssConfig(num_hidden_layers=5).to_dict()
    windows_of = ModelConfig.from_folder(write_config(tmp_path / "a", raw)).layer_windows
    del raw["layer_types"]
    again = ModelConfig.from_folder(write_config(tmp_path / "b", raw)).layer_windows
    assert again == windows_of == (128, None, 128, None, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 0}, "sliding_window = 0 must be a positive number of tokens"),
        ({"layer_types": ["full_attention"]}, f"for each of {LAYERS} layers, got ['full_attent"),
        ({"layer_types": ["linear_attention"] * LAYERS}, "must say sliding_attention or full_att"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(tmp_path, fields, message):
    folder = write_config(tmp_path / "bad", CONFIGS["gpt_oss"].to_dict() | fields)
    with pytest.raises(ModelFilesInvalid) as refused:
        ModelConfig.from_folder(folder)
    assert message in str(refused.value)
