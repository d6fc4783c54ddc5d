"""What a load makes of a pack, on every rank, against copying its blocks one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loraplex.adapter_store import Pack, PackLayoutError, write_pack
from loraplex.workers.config import ModelConfig
from loraplex.workers.errors import PoolFull
from loraplex.workers.pool import pool_pieces
from loraplex.workers.pool.adapter_pool import AdapterPool
from loraplex.workers.pool.loader import Contents, Load, Loader
from loraplex.workers.pool.pinned import PinnedMemory, as_tensor
from loraplex.workers.pool.pool_pieces import Chunks, layer_pieces
from loraplex.workers.pool.stager import CpuStager, Transfer
from loraplex.workers.shard import Shard

from tests.adapters import random_canonical, tiny_base_model

from .test_adapter_pool import numpy_to_float

CPU = torch.device("cpu")
EXPERTS = 6
BASE = tiny_base_model(num_experts=EXPERTS, num_layers=3, moe_intermediate=32)
_RANKS = [0, 1, 3, 4, 8, 9, 16]


def random_adapter(rng: random.Random) -> dict[str, Any]:
    """Options of an adapter of any format, some experts and projections of which it leaves."""
    dense = {t: rng.choice(_RANKS) for t in BASE.dense_targets if rng.random() < 0.7}
    ids = sorted(rng.sample(range(EXPERTS), rng.randrange(1, EXPERTS + 1)))
    options: dict[str, Any] = {"dense": dense, "dtype": rng.choice(["F32", "F16", "BF16"])}
    options["layers"] = sorted(rng.sample(range(3), rng.randrange(1, 4)))
    kind = rng.choice(["per expert", "fused", "shared", "dense"])
    if kind == "per expert":
        options["experts"] = {e: tuple(rng.choice(_RANKS) for _ in range(3)) for e in ids}
        options["experts"][ids[0]] = (4, 0, 3)
    elif kind == "fused":
        ranks = {e: rng.choice(_RANKS[1:]) for e in ids}
        options["experts"] = {e: (r, r, rng.choice(_RANKS)) for e, r in ranks.items()}
        options["fused_gate_up"] = True
    elif kind == "shared":
        options["experts"] = dict.fromkeys(ids, tuple(rng.choice(_RANKS[1:]) for _ in range(3)))
        options |= {"shared_a13": True, "shared_b2": rng.random() < 0.5}
    else:
        options["experts"] = ()
        dense["k_proj"] = 4
    return options


def model_like(demo) -> ModelConfig:
    return replace(
        demo.config().model,
        hidden_size=BASE.hidden,
        num_layers=BASE.num_layers,
        num_heads=BASE.num_heads,
        num_kv_heads=BASE.num_kv_heads,
        head_dim=BASE.head_dim,
        num_experts=BASE.num_experts,
        moe_intermediate_size=BASE.moe_intermediate,
    )


def pool_of(model: ModelConfig, shard: Shard, dtype=torch.float32, **options) -> AdapterPool:
    """In memory that is NaN throughout."""
    pool = AdapterPool(model, shard, 1 << 20, dtype, CPU, 4, **options)
    pool.buffer.fill_(torch.nan)
    return pool


def blocks_one_by_one(
    pool: AdapterPool, slot: int, pack: Pack
) -> Iterator[tuple[int, torch.Tensor]]:
    """Where each block lies and what it is to hold: the pack's arrays, each padded and cast."""
    shard, multiple = pool._shard, pool.experts[0].rank_multiple
    tp = (shard.expert_tp_rank, shard.expert_tp)

    def padded(array: np.ndarray, axis: int) -> torch.Tensor:
        there = numpy_to_float(array)
        missing = -there.shape[axis] % multiple
        shape = list(there.shape)
        shape[axis] = missing
        return torch.cat([there, torch.zeros(shape)], axis)

    for layer in pack.layers:
        for group, p, name in pool._tables._homes(layer.index):
            if (entry := layer.dense.get(name)) is None:
                continue
            tables = pool.dense[layer.index][group]
            cut, rows = entry.cut == "row", shard.rows(name)
            a = padded(pack.dense_a(layer, name, rows if cut else None), 1 if cut else 0)
            yield int(tables.offset_a[slot, p]), a
            b = pack.dense_b(layer, name, None if cut else rows)
            yield int(tables.offset_b[slot, p]), padded(b, 1)
        x = layer.experts
        for i, e in enumerate(x.ids if x is not None else ()):
            if e not in shard.experts:
                continue
            tables, local = pool.experts[layer.index], e - shard.experts.start
            gate, up, down = x.rank[i]
            a13 = pack.a13(layer, i)
            parts = [a13] if x.fused_gate_up else [a13[:gate], a13[gate:]]
            if gate + up:
                yield int(tables.offset_a13[slot, local]), torch.cat([padded(a, 0) for a in parts])
                b = [padded(pack.b13(layer, i, part, *tp), 1).flatten() for part in ("gate", "up")]
                yield int(tables.offset_b13[slot, local]), torch.cat(b)
            if down:
                yield int(tables.offset_a2[slot, local]), padded(pack.a2(layer, i, *tp), 1)
                yield int(tables.offset_b2[slot, local]), padded(pack.b2(layer, i), 1)


LAYOUTS = [(0, 1, 1), (0, 2, 1), (1, 2, 1), (3, 4, 1), (1, 2, 2), (2, 4, 2)]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_copying_block_by_block(demo, tmp_path, monkeypatch, layout, small):
    """`small`: pieces, gaps and stages of which a layer has many."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    model = replace(model_like(demo), num_kv_heads=BASE.num_kv_heads)
    if small:
        monkeypatch.setattr(pool_pieces, "_PIECE_BYTES", 256)
        monkeypatch.setattr(pool_pieces, "_GAP_BYTES", 0)
        monkeypatch.setattr(CpuStager, "room", 2048)
    for n in range(4):
        path = tmp_path / f"{n}"
        write_pack(path, random_canonical(BASE, rng.randrange(1 << 20), **random_adapter(rng)))
        pack = Pack.open(path)
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        multiple = rng.choice([1, 8])
        pool = pool_of(model, Shard(model, *layout), dtype, rank_multiple=multiple)
        pool.load(1, pack)
        written = torch.zeros(pool.buffer.numel(), dtype=torch.bool)
        for offset, expected in blocks_one_by_one(pool, 1, pack):
            assert offset >= 0
            found = pool.buffer[offset : offset + expected.numel()]
            assert torch.equal(found, expected.flatten().to(dtype))
            written[offset : offset + expected.numel()] = True
        assert pool.buffer[~written].isnan().all()  # and nothing else was written


def test_what_float16_cant_hold_is_its_largest(demo, tmp_path):
    write_pack(tmp_path / "pack", random_canonical(BASE, 1, std=1e5))
    pack, model = Pack.open(tmp_path / "pack"), model_like(demo)
    pool = pool_of(model, Shard(model), torch.float16)
    pool.load(0, pack)
    a = pack.dense_a(pack.layers[0], "q_proj")
    offset = int(pool.dense[0]["qkv"].offset_a[0, 0])
    expected = torch.from_numpy(np.clip(a, -65504, 65504)).flatten().half()
    assert torch.equal(pool.buffer[offset : offset + a.size], expected)
    assert (np.abs(a) > 65504).any()


def test_a_rank_stages_little_more_than_it_needs(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_pieces, "_GAP_BYTES", 64)
    base = tiny_base_model(num_experts=8, moe_intermediate=64)
    write_pack(tmp_path / "pack", random_canonical(base, 1, 16))
    pack = Pack.open(tmp_path / "pack")
    model = replace(model_like(demo), num_experts=8, moe_intermediate_size=64, num_layers=2)
    for layout, most in (((0, 1, 1), 1.0), ((1, 4, 1), 0.75), ((1, 2, 2), 0.55)):
        pool = pool_of(model, Shard(model, *layout))
        layer = pack.layers[0]
        low, high = pack.layer_span(layer)
        pieces = pool._layer_pieces(pack, layer, pool._of(layer))
        staged = sum(stage.nbytes for stage in pieces.stages)
        assert pool._of(layer).elements.sum() * 4 <= staged <= most * (high - low)
        assert sum(len(stage.copies) for stage in pieces.stages) <= 16 + 2 + 6


def test_one_copy_and_one_scatter_a_layer(demo, tmp_path):
    write_pack(tmp_path / "pack", random_canonical(BASE, 1))
    pack, model = Pack.open(tmp_path / "pack"), model_like(demo)
    pool = pool_of(model, Shard(model))
    for layer in pack.layers:
        pieces = pool._layer_pieces(pack, layer, pool._of(layer))
        assert [len(stage.copies) for stage in pieces.stages] == [1]


def test_another_models_pack_is_refused_and_its_pages_come_back(demo, tmp_path):
    other = tiny_base_model(num_experts=EXPERTS, num_layers=3, hidden=64, moe_intermediate=32)
    write_pack(tmp_path / "pack", random_canonical(other, 1))
    model = model_like(demo)
    pool = pool_of(model, Shard(model))
    with pytest.raises(PackLayoutError, match="another model's"):
        pool.load(0, Pack.open(tmp_path / "pack"))
    assert pool.used_bytes == 0
    assert (pool.experts[0].offset_a13 == -1).all()


def test_a_cut_that_chunks_dont_allow_says_so():
    with pytest.raises(PackLayoutError, match="must divide 16"):
        Chunks.of(768, 16, 0, 3)


def test_nothing_of_an_empty_layer():
    spans = SimpleNamespace(replicated=(0, 0))
    blocks: Any = SimpleNamespace(groups=())
    pieces = layer_pieces(blocks, spans, 2, Chunks(0, 1, 1), 64)  # type: ignore[arg-type]
    assert pieces.stages == ()


class SlowStager(CpuStager):
    """Notes who is moved."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8))
        self.moved: list[int] = []

    def move(self, transfer: Transfer, after: Any) -> Any:
        self.moved.append(int(transfer.memory[0]))
        time.sleep(0.005)
        return super().move(transfer, after)


def load_of(name: int, stages: int) -> Load:
    pieces = np.zeros((0, 5), np.int64)
    memory = np.full(4, name, np.uint8)
    transfers = [Transfer(memory, ((0, 4, 0),), 4, torch.float32, pieces, False, n)
                 for n in range(stages)]  # fmt: skip
    layers = [(n, 4) for n in range(stages)]
    make = lambda: Contents(dict, iter(transfers), False)  # noqa: E731
    return Load(layers, make, CpuStager(torch.zeros(1)).fence())


def test_a_small_load_doesnt_wait_behind_a_large_one():
    stager = SlowStager()
    loader = Loader(stager)
    large, small = load_of(1, 60), load_of(2, 3)
    loader.start(large)
    time.sleep(0.02)
    loader.start(small)
    small.wait()
    assert not large.launched
    large.wait()
    assert sorted(stager.moved) == [1] * 60 + [2] * 3


def test_a_cancelled_load_launches_nothing_more():
    stager = SlowStager()
    loader = Loader(stager)
    load = load_of(1, 500)
    loader.start(load)
    time.sleep(0.02)
    load.cancel()
    moved = len(stager.moved)
    assert load.done
    time.sleep(0.03)
    assert len(stager.moved) == moved < 500


def test_pages_of_a_load_are_taken_at_once_or_not_at_all(demo):
    pack = Pack.open(demo.packs.paths[demo.refs["whaler"].key])
    model = demo.config().model
    pool = AdapterPool(model, Shard(model), 4 << 20, torch.float32, CPU, 8)
    assert pool.fits(pool.layouts(pack))
    load = pool.start_load(0, pack)
    used = pool.used_bytes
    assert used == pool.required_bytes(pack)  # before anything has come
    assert not pool.fits(pool.layouts(pack))
    assert pool.fits(pool.layouts(pack), [0])
    with pytest.raises(PoolFull):
        pool.start_load(1, pack)
    assert pool.used_bytes == used
    load.wait()
    assert (pool.experts[0].offset_a13 == -1).all()  # not before it is shown
    pool.show(0)
    assert (pool.experts[0].offset_a13[0] >= 0).any()


def test_without_a_gpu_nothing_is_pinned_and_any_memory_can_be_read():
    memory = np.arange(8, dtype=np.uint8)
    memory.flags.writeable = False
    pinned = PinnedMemory(CPU)
    assert not pinned.register(memory)
    assert not pinned.holds(memory)
    assert as_tensor(memory[2:5]).tolist() == [2, 3, 4]
