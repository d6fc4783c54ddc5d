"""Whatever isn't served is refused with its exact reason, naming the key or field at fault."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import REFUSAL_CODES, AdapterRefused, load_adapter
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from .peft_models import (
    CONFIG,
    WEIGHTS,
    base_model,
    config_bytes,
    fused_model,
    unfused_model,
    write_adapter,
)

Tensors = dict[str, np.ndarray]
LAYER = "base_model.model.model.layers"
Q_A = f"{LAYER}.0.self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER}.0.self_attn.q_proj.lora_B.weight"
UP_B = f"{LAYER}.1.mlp.experts.3.up_proj.lora_B.weight"
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, unfused_model, target_modules=TARGETS)
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    write_adapter(folder, fused_model, target_modules=[], target_parameters=parameters)
    return folder


def refusal(config: bytes, weights: Path) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        load_adapter(config, weights, base_model())
    error = caught.value
    assert error.code in REFUSAL_CODES
    assert error.message == str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.message, copy.key) == (error.code, error.message, error.key)
    return error


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda ts: {k: v for k, v in ts.items() if k != key}


def with_value(key: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(ts: Tensors) -> Tensors:
        array = ts[key].copy()
        array[-1, -1] = value
        return ts | {key: array}

    return change


def adding(key: str, array: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda ts: ts | {key: array}


ROW = np.zeros((4, 32), np.float32)
TENSOR_CASES: dict[str, tuple[Callable[[Tensors], Tensors], str, str, str]] = {
    "no B": (without(Q_B), "missing_pair", Q_A, "lora_B is missing"),
    "no A": (without(Q_A), "missing_pair", Q_B, "lora_A is missing"),
    "NaN": (with_value(Q_A, np.nan), "non_finite", Q_A, "NaN"),
    "infinite": (with_value(UP_B, -np.inf), "non_finite", UP_B, "infinite"),
    "transposed": (
        lambda ts: ts | {Q_A: np.ascontiguousarray(ts[Q_A].T)},
        "wrong_shape",
        Q_A,
        r"\[32, 4\], expected \[4, 32\]",
    ),
    "another rank than configured": (
        lambda ts: ts | {Q_A: ROW[:3], Q_B: ROW.T[:, :3]},
        "wrong_shape",
        Q_A,
        "at the configured rank 4",
    ),
    "one dimension": (adding(Q_A, ROW.ravel()), "wrong_shape", Q_A, "two dimensions"),
    "float64": (adding(Q_A, ROW.astype(np.float64)), "unsupported_dtype", Q_A, "is F64"),
    "integers": (adding(Q_A, ROW.astype(np.int8)), "unsupported_dtype", Q_A, "is I8"),
    "unknown key": (adding("hello", ROW), "unknown_key", "hello", "isn't the name of a LoRA"),
    "layer out of range": (
        adding(f"{LAYER}.2.self_attn.q_proj.lora_A.weight", ROW),
        "unknown_key",
        f"{LAYER}.2.self_attn.q_proj.lora_A.weight",
        "layers 0 to 1",
    ),
    "expert out of range": (
        adding(f"{LAYER}.1.mlp.experts.4.up_proj.lora_A.weight", ROW),
        "unknown_key",
        f"{LAYER}.1.mlp.experts.4.up_proj.lora_A.weight",
        "experts 0 to 3",
    ),
    "router": (
        adding(f"{LAYER}.0.mlp.gate.lora_A.weight", ROW),
        "unsupported_target",
        f"{LAYER}.0.mlp.gate.lora_A.weight",
        "router",
    ),
    "dense MLP": (
        adding(f"{LAYER}.0.mlp.up_proj.lora_A.weight", ROW),
        "unsupported_target",
        f"{LAYER}.0.mlp.up_proj.lora_A.weight",
        "isn't served",
    ),
    "norm": (
        adding(f"{LAYER}.0.self_attn.q_norm.lora_A.weight", ROW),
        "unsupported_target",
        f"{LAYER}.0.self_attn.q_norm.lora_A.weight",
        "isn't served",
    ),
    "lm_head": (
        adding("base_model.model.lm_head.lora_A.weight", ROW),
        "unsupported_target",
        "base_model.model.lm_head.lora_A.weight",
        "lm_head",
    ),
    "embedding": (
        adding("base_model.model.model.embed_tokens.lora_embedding_A", ROW),
        "unsupported_feature",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "embeddings",
    ),
    "DoRA magnitudes": (
        adding(f"{LAYER}.0.self_attn.q_proj.lora_magnitude_vector", ROW[0]),
        "unsupported_feature",
        f"{LAYER}.0.self_attn.q_proj.lora_magnitude_vector",
        "DoRA",
    ),
    "bias": (
        adding(f"{LAYER}.0.self_attn.q_proj.lora_B.bias", ROW[0]),
        "unsupported_feature",
        f"{LAYER}.0.self_attn.q_proj.lora_B.bias",
        "bias",
    ),
    "saved module": (
        adding("base_model.model.score.modules_to_save.weight", ROW),
        "unsupported_feature",
        "base_model.model.score.modules_to_save.weight",
        "fully trained",
    ),
    "not in the config": (
        lambda ts: ts | {f"{LAYER}.0.self_attn.k_proj.lora_{s}.weight": ROW for s in "AB"},
        "not_targeted",
        f"{LAYER}.0.self_attn.k_proj.lora_A.weight",
        "doesn't target model.layers.0.self_attn.k_proj",
    ),
    "the same factor twice": (
        lambda ts: ts | {Q_A.removeprefix("base_model.model."): ts[Q_A]},
        "duplicate_key",
        Q_A,
        "same factor",
    ),
    "the same module under two names": (
        lambda ts: (
            ts | {k.replace("model.model.layers", "model.layers"): ts[k] for k in (Q_A, Q_B)}
        ),
        "duplicate_key",
        Q_A,
        "same factor",
    ),
    "nothing": (lambda ts: {}, "empty_adapter", "", "no tensor"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors_that_arent_served(case: str, adapter: Path, tmp_path: Path) -> None:
    change, code, key, message = TENSOR_CASES[case]
    weights = tmp_path / WEIGHTS
    save_file(change(load_file(adapter / WEIGHTS)), weights)
    error = refusal((adapter / CONFIG).read_bytes(), weights)
    assert error.code == code
    assert key in ("", error.key) or (code == "duplicate_key" and key in error.message)
    assert re.search(message, error.message), error.message


CONFIG_CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "DoRA": ({"use_dora": True}, "unsupported_feature", "use_dora", "DoRA"),
    "bias": ({"bias": "all"}, "unsupported_feature", "bias", "'all'"),
    "LoRA bias": ({"lora_bias": True}, "unsupported_feature", "lora_bias", "bias"),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        "unsupported_feature",
        "modules_to_save",
        "lm_head",
    ),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "unsupported_feature", "fan_in_fan_out", "fan_in"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "unsupported_feature",
        "init_lora_weights",
        "changes the base weights",
    ),
    "token embeddings": (
        {"trainable_token_indices": [1]},
        "unsupported_feature",
        "trainable_token_indices",
        "token",
    ),
    "replicated layers": (
        {"layer_replication": [[0, 2]]},
        "unsupported_feature",
        "layer_replication",
        "replication",
    ),
    "what a later PEFT may add": (
        {"use_newlora": True},
        "unsupported_feature",
        "use_newlora",
        "isn't known",
    ),
    "another method": ({"peft_type": "IA3"}, "unsupported_peft_type", "peft_type", "'IA3'"),
    "no method": ({"peft_type": None}, "unsupported_peft_type", "peft_type", "None"),
    "another base model": (
        {"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"},
        "wrong_base",
        "base_model_name_or_path",
        "tiny-moe",
    ),
    "rank too high": ({"r": 257}, "rank_limit", "r", "1 to 256"),
    "rank zero": ({"rank_pattern": {"q_proj": 0}}, "rank_limit", "rank_pattern", "1 to 256"),
    "rank of a wrong type": ({"r": 4.0}, "bad_config", "r", "integer"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "bad_config", "lora_alpha", "finite"),
    "alpha a flag": ({"alpha_pattern": {"x": True}}, "bad_config", "alpha_pattern", "finite"),
    "rsLoRA not a flag": ({"use_rslora": "yes"}, "bad_config", "use_rslora", "true or false"),
    "no targets": (
        {"target_modules": None, "target_parameters": None},
        "bad_config",
        "target_modules",
        "neither",
    ),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, "bad_config", "rank_pattern", "'\\('"),
    "look-around": (
        {"target_modules": r"(?!x).*"},
        "bad_config",
        "target_modules",
        "isn't supported",
    ),
    "layers with a pattern": (
        {"target_modules": ".*", "layers_to_transform": [0]},
        "bad_config",
        "layers_to_transform",
        "string",
    ),
    "excluded": (
        {"exclude_modules": ["q_proj"]},
        "not_targeted",
        Q_A,
        "model.layers.0.self_attn.q_proj",
    ),
    "other layers": (
        {"layers_to_transform": [1]},
        "not_targeted",
        f"{LAYER}.0.",
        "layers_to_transform",
    ),
    "patterns that change the rank": (
        {"rank_pattern": {r"experts\.3\.up_proj": 2}},
        "wrong_shape",
        ".mlp.experts.3.up_proj.lora_A.weight",
        "at the configured rank 2",
    ),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_configs_that_arent_served(case: str, adapter: Path) -> None:
    change, code, key, message = CONFIG_CASES[case]
    error = refusal(config_bytes(adapter, **change), adapter / WEIGHTS)
    assert error.code == code
    assert error.key is not None
    assert key in error.key
    assert re.search(message, error.message), error.message


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b"null"],
    ids=["empty", "list", "cut", "binary", "deep", "huge number", "null"],
)
def test_configs_that_cant_be_read(raw: bytes, adapter: Path) -> None:
    assert refusal(raw, adapter / WEIGHTS).code == "bad_config"


@pytest.mark.parametrize("name", ["Org/TINY-MoE", "tiny-moe/", "", None, "./out", "/a/b", "C:\\m"])
def test_base_names_that_are_accepted(name: str | None, adapter: Path) -> None:
    config = config_bytes(adapter, base_model_name_or_path=name)
    load_adapter(config, adapter / WEIGHTS, base_model())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["none", "LORA", "q_proj", ".*", "(", "all-linear", "\ud800", "0.18"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(TARGETS), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(LoraConfig().to_dict())) | st.text(max_size=4), json_values
    )
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_config_is_served_or_refused(adapter: Path, changes: dict[str, Any]) -> None:
    try:
        load_adapter(config_bytes(adapter, **changes), adapter / WEIGHTS, base_model())
    except AdapterRefused as error:
        refused = error
    else:
        return
    assert refused.code in REFUSAL_CODES
    f"{refused.message} {refused.key}".encode()  # can be sent


@given(at=st.integers(0, 1 << 20), junk=st.binary(min_size=1, max_size=4))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_weights_are_served_or_refused(
    adapter: Path, tmp_path: Path, at: int, junk: bytes
) -> None:
    raw = (adapter / WEIGHTS).read_bytes()
    at %= len(raw) - len(junk)
    (tmp_path / WEIGHTS).write_bytes(raw[:at] + junk + raw[at + len(junk) :])
    try:
        loaded = load_adapter((adapter / CONFIG).read_bytes(), tmp_path / WEIGHTS, base_model())
    except AdapterRefused as error:
        error.message.encode()
    else:
        assert all(np.isfinite(f.a).all() for x in loaded.adapter.layers for f in x.factors())


def test_pickles_are_refused_unread(adapter: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    weights = tmp_path / "adapter_model.bin"
    config = (adapter / CONFIG).read_bytes()
    torch.save({"x": torch.zeros(3)}, weights)
    assert "zip archive" in refusal(config, weights).message
    for protocol in (2, 4, 5):
        weights.write_bytes(pickle.dumps(Bomb(), protocol))
        error = refusal(config, weights)
        assert error.code == "not_safetensors"
        assert "pickle" in error.message
    assert not (tmp_path / "exploded").exists()


def test_layers_without_experts_cant_have_them_adapted(adapter: Path) -> None:
    import dataclasses

    base = dataclasses.replace(base_model(), moe_layers=(0,))
    with pytest.raises(AdapterRefused, match="layer 1 of tiny-moe has no experts") as caught:
        load_adapter((adapter / CONFIG).read_bytes(), adapter / WEIGHTS, base)
    assert caught.value.code == "unsupported_target"


def test_fused_factors_of_a_parameter_that_isnt_targeted(fused: Path) -> None:
    config = config_bytes(fused, target_parameters=["experts.down_proj"])
    error = refusal(config, fused / WEIGHTS)
    assert error.code == "not_targeted"
    assert error.key == f"{LAYER}.0.mlp.experts.base_layer.lora_A.weight"


def test_fused_factors_of_another_rank(fused: Path) -> None:
    error = refusal(config_bytes(fused, rank_pattern={"down_proj": 5}), fused / WEIGHTS)
    assert error.code == "wrong_shape"
    assert error.key == f"{LAYER}.0.mlp.experts.lora_A.weight"
    assert "[20, 24]" in error.message


def test_rewritten_rank_over_the_limit(tmp_path: Path) -> None:
    write_adapter(tmp_path, fused_model, target_modules=TARGETS[1:], r=129)
    config = config_bytes(tmp_path)
    assert json.loads(config)["rank_pattern"] == {r".*\.gate_up_proj": 258}
    assert refusal(config, tmp_path / WEIGHTS).code == "rank_limit"


def test_orientation_that_nothing_decides(tmp_path: Path) -> None:
    import dataclasses

    # With H = 2I, gate_up fits both layouts; down would tell, but it isn't adapted.
    model = lambda: fused_model(moe_intermediate_size=16)  # noqa: E731
    parameters = ["experts.gate_up_proj"]
    write_adapter(tmp_path, model, target_modules=[], target_parameters=parameters)
    base = dataclasses.replace(base_model(), moe_intermediate=16)

    def load(**changes: Any) -> np.ndarray:
        config = config_bytes(tmp_path, **changes)
        layer = load_adapter(config, tmp_path / WEIGHTS, base).adapter.layers[0]
        gate = layer.experts[0].gate
        assert gate is not None
        return gate.b @ gate.a

    with pytest.raises(AdapterRefused, match="peft_version") as caught:
        load(peft_version=None)
    assert caught.value.code == "ambiguous_layout"
    assert caught.value.key == f"{LAYER}.0.mlp.experts.lora_A.weight"
    new, old = load(peft_version="0.19.0"), load(peft_version="0.18.1")
    assert not np.allclose(new, old)


def test_every_field_that_peft_writes_is_known(adapter: Path) -> None:
    """A field of PEFT's that isn't listed would refuse every adapter that uses it."""
    from loraplex.adapter_store import config_fields

    known = config_fields._KNOWN | config_fields._UNSERVED.keys()
    assert LoraConfig().to_dict().keys() <= known | {"bias", "runtime_config"}
    load_adapter((adapter / CONFIG).read_bytes(), adapter / WEIGHTS, base_model())
