"""A pack gives back every factor bit by bit, in whatever parts; damage never goes unnoticed."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import (
    AdapterRefused,
    CanonicalAdapter,
    CanonicalLayer,
    Pack,
    PackCorrupt,
    PackLayer,
    PackLayoutError,
    PackVersionError,
    adapter_digest,
    write_pack,
)

from tests.adapters import random_canonical, tiny_base_model

TP_SIZES = (1, 2, 4, 8)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def assert_holds(pack: Pack, adapter: CanonicalAdapter) -> None:
    """Every factor of `adapter` comes back from `pack`, whole and cut for every TP size."""
    assert pack.dtype == adapter.dtype
    assert pack.base_fingerprint == adapter.base.fingerprint
    assert pack.digest == adapter_digest(adapter)
    assert [layer.index for layer in pack.layers] == [layer.index for layer in adapter.layers]
    for stored, layer in zip(pack.layers, adapter.layers, strict=True):
        assert_holds_dense(pack, stored, layer)
        if stored.experts is None:
            assert not layer.experts
        else:
            assert_holds_experts(pack, stored, layer)


def assert_holds_dense(pack: Pack, stored: PackLayer, layer: CanonicalLayer) -> None:
    assert stored.dense.keys() == layer.dense.keys()
    for name, factors in layer.dense.items():
        entry = stored.dense[name]
        assert (entry.rank, entry.scale) == (factors.rank, factors.scale)
        a = factors.a if entry.cut == "column" else factors.a.T
        same_bits(pack.dense_a(stored, name), a)
        same_bits(pack.dense_b(stored, name), factors.b)
        cut, whole = (pack.dense_b, factors.b) if entry.cut == "column" else (pack.dense_a, a)
        for tp in TP_SIZES:
            rows = whole.shape[0] // tp
            for rank in range(tp):
                part = (rank * rows, (rank + 1) * rows)
                same_bits(cut(stored, name, rows=part), whole[slice(*part)])


def assert_holds_experts(pack: Pack, stored: PackLayer, layer: CanonicalLayer) -> None:
    entry = stored.experts
    assert entry is not None
    assert entry.ids == tuple(layer.experts)
    assert entry.rank == tuple(e.rank for e in layer.experts.values())
    assert entry.scale == tuple(e.scale for e in layer.experts.values())
    flags = (layer.fused_gate_up, layer.shared_a13, layer.shared_b2)
    assert (entry.fused_gate_up, entry.shared_a13, entry.shared_b2) == flags
    for i, expert in enumerate(layer.experts.values()):
        gate, up, down = expert.projections()
        parts = [gate] if layer.fused_gate_up else [gate, up]
        rows = [p.a for p in parts if p is not None]
        if rows:
            same_bits(pack.a13(stored, i), np.concatenate(rows))
        else:
            assert pack.a13(stored, i).shape == (0, pack.hidden)
        for tp in [t for t in TP_SIZES if pack.chunks % t == 0]:
            for rank in range(tp):
                cut = slice(rank * pack.intermediate // tp, (rank + 1) * pack.intermediate // tp)
                for part, factors in (("gate", gate), ("up", up)):
                    got = pack.b13(stored, i, part, rank, tp)  # type: ignore[arg-type]
                    if factors is None:
                        assert got.shape == (pack.intermediate // tp, 0)
                    else:
                        same_bits(got, factors.b[cut])
                got = pack.a2(stored, i, rank, tp)
                if down is None:
                    assert got.shape == (pack.intermediate // tp, 0)
                else:
                    same_bits(got, down.a.T[cut])
        assert pack.b2(stored, i).shape == (pack.hidden, entry.rank[i][2])
        if down is not None:
            same_bits(pack.b2(stored, i), down.b)


@st.composite
def adapters(draw: st.DrawFn) -> CanonicalAdapter:
    base = tiny_base_model(
        num_layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([8, 24])),
        moe_intermediate=draw(st.sampled_from([3, 8, 16, 24, 48])),
        num_experts=draw(st.integers(1, 5)),
    )
    ids = st.sets(st.integers(0, base.num_experts - 1))
    fused, shared_a, shared_b = (draw(st.booleans()) for _ in range(3))
    rank = st.integers(0, 5)
    common = (draw(rank), draw(rank), draw(rank))
    experts: dict[int, tuple[int, int, int]] = {}
    for e in draw(ids):
        gate = common[0] if shared_a else draw(rank)
        up = gate if fused else (common[1] if shared_a else draw(rank))
        experts[e] = (gate, up, common[2] if shared_b else draw(rank))
    dense = {name: draw(rank) for name in draw(st.sets(st.sampled_from([*base.dense_targets])))}
    if not any(dense.values()) and not any(any(r) for r in experts.values()):
        dense["q_proj"] = 2
    return random_canonical(
        base,
        seed=draw(st.integers(0, 1 << 32)),
        dense=dense,
        experts=experts,
        layers=sorted(draw(st.sets(st.integers(0, base.num_layers - 1), min_size=1))),
        fused_gate_up=fused,
        shared_a13=shared_a,
        shared_b2=shared_b,
        dtype=draw(st.sampled_from(["F32", "F16", "BF16"])),
    )


@given(adapter=adapters())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_adapter_survives_the_round_trip(tmp_path: Path, adapter: CanonicalAdapter) -> None:
    path = tmp_path / "adapter.pack"
    assert write_pack(path, adapter) == path.stat().st_size
    assert_holds(Pack.open(path), adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pack"]


@pytest.mark.parametrize("flags", [{}, {"fused_gate_up": True}, {"shared_a13": True}])
@pytest.mark.parametrize("shared_b2", [False, True])
def test_what_experts_share_is_stored_once(
    flags: dict[str, bool], shared_b2: bool, tmp_path: Path
) -> None:
    base = tiny_base_model(num_experts=8)
    plain = write_pack(tmp_path / "plain", random_canonical(base, 1, dense={}))
    adapter = random_canonical(base, 1, dense={}, shared_b2=shared_b2, **flags)  # type: ignore[arg-type]
    size = write_pack(tmp_path / "shared", adapter)
    factor = 4 * base.hidden * 4  # bytes of one A or B over the model's width, rank 4
    saved = 0
    if flags.get("fused_gate_up"):
        saved += 8 * factor
    if flags.get("shared_a13"):
        saved += 2 * 7 * factor
    if shared_b2:
        saved += 7 * factor
    assert plain - size == base.num_layers * saved
    experts = Pack.open(tmp_path / "shared").layers[0].experts
    assert experts is not None
    assert experts.shared_b2 == shared_b2
    assert experts.shared_a13 == flags.get("shared_a13", False)
    assert experts.fused_gate_up == flags.get("fused_gate_up", False)


def test_tensors_start_at_aligned_places(tmp_path: Path) -> None:
    base = tiny_base_model(hidden=24, moe_intermediate=24)
    write_pack(tmp_path / "p", random_canonical(base, 5, rank=3, dtype="BF16"))
    pack = Pack.open(tmp_path / "p")
    origin = pack.memory.ctypes.data
    for layer in pack.layers:
        arrays = [pack.dense_a(layer, t) for t in layer.dense]
        arrays += [pack.dense_b(layer, t) for t in layer.dense]
        arrays += [f(layer, i) for f in (pack.a13, pack.b2) for i in range(base.num_experts)]
        assert all((a.ctypes.data - origin) % 16 == 0 for a in arrays)
        assert all(a.base is not None for a in arrays)  # views, not copies


def test_a_layers_span_holds_all_of_its_tensors_and_nothing_else(tmp_path: Path) -> None:
    base = tiny_base_model(num_layers=3)
    write_pack(tmp_path / "p", random_canonical(base, 6, rank=3, layers=[0, 2], dtype="F16"))
    pack = Pack.open(tmp_path / "p")
    assert pack.memory.tobytes() == (tmp_path / "p").read_bytes()
    assert not pack.memory.flags.writeable
    origin = pack.memory.ctypes.data
    end = None
    for layer in pack.layers:
        start, stop = pack.layer_span(layer)
        assert end is None or start == end  # nothing between two layers
        end = stop
        views = [pack.dense_a(layer, t) for t in layer.dense]
        views += [f(layer, i) for f in (pack.a13, pack.b2) for i in range(base.num_experts)]
        places = [(v.ctypes.data - origin, v.ctypes.data - origin + v.nbytes) for v in views]
        assert all(start <= low < high <= stop for low, high in places)
        # What is cut lies there too, by its size: those are copies.
        held = sum(v.nbytes for v in views) + sum(
            pack.dense_b(layer, t).nbytes for t in layer.dense
        )
        held += sum(
            a.nbytes
            for i in range(base.num_experts)
            for a in (pack.b13(layer, i, "gate"), pack.b13(layer, i, "up"), pack.a2(layer, i))
        )
        padding = 16 * (len(views) + len(layer.dense) + 3 * pack.chunks * base.num_experts)
        assert held <= stop - start < held + padding
    assert end == pack.nbytes


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_pack(tmp_path / "adapter.pack", random_canonical(tiny_base_model(), 7, dtype="F16"))
    return tmp_path / "adapter.pack"


def test_any_flipped_bit_is_found(packed: Path) -> None:
    raw = packed.read_bytes()
    rng = np.random.default_rng()
    (header_bytes,) = struct.unpack_from("<I", raw, 12)
    data_start = -(-(20 + header_bytes) // 4096) * 4096
    places = [0, 9, 13, 17, 20, 20 + header_bytes - 1, data_start, len(raw) - 1]
    places += [int(x) for x in rng.integers(data_start, len(raw), 30)]
    for at in places:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        packed.write_bytes(damaged)
        with pytest.raises((PackCorrupt, PackVersionError)):
            Pack.open(packed)


def test_a_flip_names_the_block(tmp_path: Path) -> None:
    base = tiny_base_model(hidden=256, moe_intermediate=128, num_experts=8)
    path = tmp_path / "large.pack"
    assert write_pack(path, random_canonical(base, 1, rank=64)) > 3 << 20
    raw = bytearray(path.read_bytes())
    raw[(2 << 20) + 17] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PackCorrupt, match=r"bytes \d+ to \d+ don't match") as caught:
        Pack.open(path)
    low, high = (int(w) for w in str(caught.value).split() if w.isdigit())
    assert low <= (2 << 20) + 17 < high
    Pack.open(path, verify=False)  # the caller has verified it before


@pytest.mark.parametrize("verify", [True, False])
def test_any_truncation_and_any_tail_is_found(packed: Path, verify: bool) -> None:
    raw = packed.read_bytes()
    for size in [0, 7, 19, 20, 300, 4096, len(raw) // 2, len(raw) - 1]:
        packed.write_bytes(raw[:size])
        with pytest.raises(PackCorrupt):
            Pack.open(packed, verify=verify)
    packed.write_bytes(raw + b"\0")
    with pytest.raises(PackCorrupt, match="were written"):
        Pack.open(packed, verify=verify)


def test_another_version_asks_to_be_remade(packed: Path) -> None:
    raw = bytearray(packed.read_bytes())
    struct.pack_into("<I", raw, 8, 2)
    packed.write_bytes(raw)
    with pytest.raises(PackVersionError, match="remake it"):
        Pack.open(packed)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.a2(0, 0, 0, 3), "must divide 16"),
        (lambda p: p.b13(0, 0, "gate", 2, 2), "rank 2 of 2"),
        (lambda p: p.a13(0, 4), "position 4 was asked for"),
        (lambda p: p.a13(5, 0), "layer 5 isn't adapted"),
        (lambda p: p.dense_a(0, "gate"), "has no 'gate'"),
        (lambda p: p.dense_b(0, "q_proj", rows=(30, 40)), "rows 30:40 of a tensor of 32"),
    ],
)
def test_what_isnt_there_is_refused(packed: Path, ask: Any, message: str) -> None:
    with pytest.raises(PackLayoutError, match=message):
        ask(Pack.open(packed))


@pytest.mark.parametrize(
    "what", [{"dense": {}, "experts": ()}, {"dense": {}, "experts": {0: (0, 0, 0)}}, {"layers": ()}]
)
def test_an_adapter_of_nothing_makes_no_pack(tmp_path: Path, what: dict[str, Any]) -> None:
    adapter = random_canonical(tiny_base_model(), 1, **what)
    with pytest.raises(AdapterRefused, match="changes nothing"):
        write_pack(tmp_path / "pack", adapter)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_pack(packed: Path) -> None:
    before = packed.read_bytes()
    adapter = random_canonical(tiny_base_model(), 8)
    layer = adapter.layers[0]
    broken = dataclasses.replace(layer, dense={"q_proj": None})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        write_pack(packed, dataclasses.replace(adapter, layers=(broken,)))
    assert packed.read_bytes() == before
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]
