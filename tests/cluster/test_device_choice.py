"""Which device, how many groups and what numbers a service gets when it is left to choose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loraplex.cluster.rank_program import dtype_of
from loraplex.cluster.settings import Settings
from loraplex.cluster.up_checks import CheckError, choose_device

CHECKS = "loraplex.cluster.up_checks"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHECKS}.gpu_count", lambda: 1)
    monkeypatch.setattr(f"{CHECKS}.torch_has_cuda", lambda: True)
    monkeypatch.delenv("LORAPLEX_GROUPS", raising=False)


def test_groups_that_nobody_asked_for_are_as_many_as_fit(one_gpu) -> None:
    for settings in (Settings(), Settings(device="cuda")):
        chosen = choose_device(settings)
        assert (chosen.device, chosen.groups) == ("cuda", 1)


def test_groups_that_were_asked_for_must_fit(one_gpu, monkeypatch) -> None:
    with pytest.raises(CheckError, match="need 2 GPUs, there are 1"):
        choose_device(Settings(device="cuda", groups=2))
    monkeypatch.setenv("LORAPLEX_GROUPS", "2")
    with pytest.raises(CheckError, match="need 2 GPUs, there are 1"):
        choose_device(Settings(device="cuda"))


def test_a_gpus_memory_is_shared_out_by_its_groups_where_no_size_is_given() -> None:
    cpu, gpu = Settings(device="cpu"), Settings(device="cuda")
    assert (cpu.rank_pool_bytes, cpu.group_kv_tokens) == (1 << 30, 16384)
    assert (gpu.rank_pool_bytes, gpu.group_kv_tokens) == (None, None)
    for device in ("cpu", "cuda"):
        given = Settings.load(device=device, pool_bytes="2GiB", kv_tokens=4096)
        assert (given.rank_pool_bytes, given.group_kv_tokens) == (2 << 30, 4096)


@pytest.mark.parametrize(
    ("config", "on_gpu"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "float8_e4m3fn"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_a_gpu_computes_in_the_checkpoints_numbers(tmp_path: Path, config, on_gpu) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dtype_of(Settings(model_path=tmp_path, device="cuda")) == on_gpu
    assert dtype_of(Settings(model_path=tmp_path, device="cpu")) == "float32"
    assert dtype_of(Settings(model_path=tmp_path, device="cuda", dtype="float32")) == "float32"


def test_a_model_that_isnt_there_is_for_others_to_name(tmp_path: Path) -> None:
    assert dtype_of(Settings(model_path=tmp_path / "none", device="cuda")) == "bfloat16"
