"""Whatever bytes are uploaded, reading their header ends in a header or in AdapterRefused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import AdapterRefused
from loraplex.adapter_store.safetensors_header import MAX_HEADER_BYTES, read_header
from safetensors.numpy import save, save_file

quick = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
VALID = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)}, {"format": "pt"})


def wrap(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def read(raw: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "weights"
    path.write_bytes(raw)
    return read_header(path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    tensors = {
        f"t{i}": rng.normal(size=rng.integers(0, 4, rng.integers(0, 4))).astype(np.float32)
        for i in range(20)
    }
    save_file(tensors, tmp_path / "weights", metadata={"format": "pt"})
    raw = (tmp_path / "weights").read_bytes()
    header = read_header(tmp_path / "weights")
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    for name, info in header.tensors.items():
        assert info.shape == tensors[name].shape
        assert raw[info.start : info.end] == tensors[name].tobytes()


@given(raw=st.binary(max_size=300))
@example(raw=b"\x80\x02}q\x00.")
@example(raw=b"PK\x03\x04" + b"\0" * 40)
@quick
def test_random_bytes(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(AdapterRefused) as caught:
        read(raw, tmp_path)
    assert caught.value.code in ("not_safetensors", "bad_header")


@given(
    at=st.integers(0, len(VALID) - 1),
    junk=st.binary(min_size=1, max_size=6),
    cut=st.integers(0, 12),
)
@quick
def test_mutated_files(tmp_path: Path, at: int, junk: bytes, cut: int) -> None:
    try:
        read(VALID[:at] + junk + VALID[at + cut :], tmp_path)
    except AdapterRefused as error:
        error.message.encode()  # can be sent


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F32", "dtype", "shape", "data_offsets", "\ud800", "", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(
    header=json_values
    | st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {"dtype": json_values, "shape": json_values, "data_offsets": json_values}
        ),
    )
)
@quick
def test_any_json(tmp_path: Path, header: Any) -> None:
    try:
        found = read(wrap(header), tmp_path)
    except AdapterRefused as error:
        error.message.encode()
        (error.key or "").encode()
    else:
        assert all(info.start == info.end for info in found.tensors.values())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (wrap({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"\0" * 6), "overlaps"),
        (wrap({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "leaves a gap"),
        (wrap({"a": entry([1], 4, 8)}, b"\0" * 8), "leaves a gap"),
        (wrap({"a": entry([1], 0, 4)}, b"\0" * 5), "belong to no tensor"),
        (wrap({"a": entry([3], 0, 8)}, b"\0" * 8), "doesn't fill"),
        (wrap({"a": entry([1 << 40, 1 << 40, 0], 0, 4)}, b"\0" * 4), "doesn't fill"),
        (wrap({"a": entry([-1, -1], 0, 4)}, b"\0" * 4), "natural"),
        (wrap({"a": entry([True], 0, 4)}, b"\0" * 4), "natural"),
        (wrap({"a": entry([1.0], 0, 4)}, b"\0" * 4), "natural"),
        (wrap({"a": entry([1], -4, 0)}), "natural"),
        (wrap({"a": entry([1] * 9, 0, 4)}, b"\0" * 4), "at most 8"),
        (wrap({"a": entry([1], 0, 4, "F31")}, b"\0" * 4), "dtype 'F31' isn't known"),
        (wrap({"a": entry([1], 0, 4, ["F32"])}, b"\0" * 4), "isn't known"),
        (wrap({"a": {"dtype": "F32"}}), "needs exactly"),
        (wrap({"a": entry([1], 0, 4) | {"more": 1}}, b"\0" * 4), "needs exactly"),
        (wrap(b'{"a":1,"a":1}'), "'a': it is listed twice"),
        (wrap(b'{"a":{"dtype":"F32","shape":[],"shape":[]}}'), "'shape': it is listed twice"),
        (wrap({"__metadata__": {"a": 1}}), "strings to strings"),
        (wrap(b"[]"), "isn't a JSON object"),
        (wrap(b'{"a": NaN}'), "NaN is no JSON value"),
        (wrap(b"[" * 100_000), "isn't valid JSON"),
        (wrap(b'{"a":' + b"9" * 5000 + b"}"), "isn't valid JSON"),
        (wrap(b"\xff\xfe"), "isn't valid JSON"),
    ],
)
def test_headers_that_contradict_themselves(raw: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=message) as caught:
        read(raw, tmp_path)
    assert caught.value.code == "bad_header"


def test_a_file_that_is_cut_short_is_told_by_both_sizes_and_its_first_cut_tensor(
    tmp_path: Path,
) -> None:
    tensors = {"a": entry([1], 0, 4), "b": entry([2], 4, 12), "c": entry([1], 12, 16)}
    raw = wrap(tensors, b"\0" * 9)
    with pytest.raises(AdapterRefused) as caught:
        read(raw, tmp_path)
    assert caught.value.code == "bad_header"
    assert caught.value.key == "b"
    assert caught.value.message == (
        f"the weights file is cut short: it has {len(raw)} bytes, and by its header "
        f"{len(raw) + 7}; tensor 'b' is the first that isn't whole. Upload all of "
        "adapter_model.safetensors"
    )


def test_a_huge_header_isnt_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        os.truncate(path, 2 * MAX_HEADER_BYTES)  # sparse
    with pytest.raises(AdapterRefused, match="at most"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(AdapterRefused, match="should have"):
        read_header(path)
