"""Uploads that can't be served: refused by name, with nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import load

from tests.e2e.service import Service, Tenant, files_of

pytestmark = [pytest.mark.timeout(400), pytest.mark.cluster]

PROMPT = "In the beginning"


def _first(tensors: dict[str, np.ndarray], end: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(end))


def dora(config: dict, tensors: dict[str, np.ndarray]) -> str:
    config["use_dora"] = True
    return "use_dora"


def not_finite(config: dict, tensors: dict[str, np.ndarray]) -> str:
    key = _first(tensors, "q_proj.lora_B.weight")
    tensors[key][1, 2] = np.nan
    return key


def strange_tensor(config: dict, tensors: dict[str, np.ndarray]) -> str:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    tensors[key] = np.zeros((8, 256), np.float32)
    return key


def router(config: dict, tensors: dict[str, np.ndarray]) -> str:
    key = "base_model.model.model.layers.0.mlp.gate.lora_A.weight"
    tensors[key] = np.zeros((8, 256), np.float32)
    return key


def wrong_shape(config: dict, tensors: dict[str, np.ndarray]) -> str:
    key = _first(tensors, "k_proj.lora_A.weight")
    tensors[key] = tensors[key][:, :-1].copy()
    return key


def half_a_pair(config: dict, tensors: dict[str, np.ndarray]) -> str:
    key = _first(tensors, "v_proj.lora_B.weight")
    del tensors[key]
    return key.replace("lora_B", "lora_A")


MALFORMED = {
    "unsupported_feature": dora,
    "non_finite": not_finite,
    "unknown_key": strange_tensor,
    "unsupported_target": router,
    "wrong_shape": wrong_shape,
    "missing_pair": half_a_pair,
}


def malformed(change: Callable[[dict, dict[str, np.ndarray]], str]) -> tuple[str, bytes, bytes]:
    """What is at fault, and the files of a good adapter with that one thing changed."""
    raw_config, _ = files_of("devil")
    config, tensors = json.loads(raw_config), as_float32("devil")
    at_fault = change(config, tensors)
    return at_fault, json.dumps(config).encode(), save(tensors)


def as_float32(adapter: str) -> dict[str, np.ndarray]:
    tensors = load(files_of(adapter)[1])
    return {key: value.to(torch.float32).numpy() for key, value in tensors.items()}


def expect_refusal(
    service: Service, tenant: Tenant, config: bytes, weights: bytes, code: str
) -> dict:
    """Uploads to a name that is there and to a new one; nothing may change. The error."""
    prefix = f"tenants/{tenant.id}/"
    before = service.stored(prefix)
    for name in ("good", "bad"):
        response = tenant.upload(name, config, weights)
        assert response.status_code == 422, response.text
        assert response.json()["error"]["code"] == code
    assert service.stored(prefix) == before
    assert service.stored(f"quarantine/{tenant.id}/") == []
    assert tenant.adapters() == ["good"]
    return response.json()["error"]


@pytest.fixture(scope="module")
def uploader(service: Service) -> Iterator[Tenant]:
    with service.tenant() as tenant:
        tenant.publish("good", "devil")
        yield tenant
        assert tenant.text("good", PROMPT) == service.owners["devil"].text("devil", PROMPT)


@pytest.mark.parametrize("code", MALFORMED)
def test_a_malformed_adapter_is_refused_by_name_and_leaves_nothing(
    service: Service, uploader: Tenant, code: str
) -> None:
    at_fault, config, weights = malformed(MALFORMED[code])
    error = expect_refusal(service, uploader, config, weights, code)
    assert at_fault in error["message"]
    assert error["param"] == at_fault
    assert error["type"] == "invalid_request_error"


def test_files_that_are_something_else_are_refused_and_leave_nothing(
    service: Service, uploader: Tenant
) -> None:
    config, weights = files_of("devil")
    expect_refusal(service, uploader, b"{", weights, "bad_config")
    expect_refusal(service, uploader, config, b"PK\x03\x04" + weights, "not_safetensors")
    expect_refusal(service, uploader, config, weights[:-1], "bad_header")
    other = json.dumps({**json.loads(config), "base_model_name_or_path": "some/other-model"})
    error = expect_refusal(service, uploader, other.encode(), weights, "wrong_base")
    assert "some/other-model" in error["message"]
    response = uploader.upload("No Such Name", config, weights)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_name"
    assert service.stored(f"quarantine/{uploader.id}/") == []
