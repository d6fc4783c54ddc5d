"""Slices of tensors, read by plain reads: what the safetensors library gives for them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.workers import ModelFilesInvalid, safetensors_file
from loraplex.workers.safetensors_file import SafetensorsFile
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with a tensor for each number of dimensions and dtype."""
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    tensors = {}
    for dtype in DTYPES:
        for shape in ((), (7,), (9, 6), (5, 4, 11), (3, 300, 200)):
            values = torch.randn(shape) * 50
            tensors[f"{dtype}{shape}"] = values.abs().to(dtype)
    save_file(tensors, path)
    return path, tensors


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_slices_of_any_tensor_are_those_of_the_tensor(saved, data):
    path, tensors = saved
    name = data.draw(st.sampled_from(sorted(tensors)))
    whole = tensors[name]
    slices = []
    for n in whole.shape:
        start = data.draw(st.integers(0, n))
        slices.append(slice(start, data.draw(st.integers(start, n))))
    shortest = data.draw(st.sampled_from([1, 100, 64 << 10]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "_MIN_RUN_BYTES", shortest)
        file = SafetensorsFile(path)
        found = file.read(name, slices, lambda n: torch.empty(n, dtype=torch.uint8))
        file.close()
    assert found.dtype == whole.dtype
    assert torch.equal(found, whole[tuple(slices)])


def test_tensors_are_those_that_the_library_finds(saved):
    path, _ = saved
    file = SafetensorsFile(path)
    with safe_open(path, "pt") as reference:
        names = set(reference.keys())
        assert file.tensors.keys() == names
        for name in names:
            assert list(file.tensors[name].shape) == reference.get_slice(name).get_shape()
    file.close()


def test_damaged_files_are_refused_with_the_reason(saved, tmp_path):
    raw = saved[0].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for damaged, reason in (
        (b"", "the file has 0"),
        (raw[:5], "the file has 5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "its header would have"),
        (raw[: 8 + length // 2], "its header would have"),
        (raw[:-1], "is the file cut short"),
        (raw[:8] + b"x" * length + raw[8 + length :], "Expecting value"),
        (raw[:8] + random.randbytes(length) + raw[8 + length :], "safetensors: "),
    ):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(ModelFilesInvalid, match=f"{path}.*{reason}"):
            SafetensorsFile(path)
    with pytest.raises(ModelFilesInvalid, match="No such file"):
        SafetensorsFile(tmp_path / "none")
