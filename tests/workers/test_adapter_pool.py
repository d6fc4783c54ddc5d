"""The pool holds exactly a pack's factors, gives every byte back, and frees by poisoning."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import Pack
from loraplex.kernels import gather_dense_factors, gather_factors
from loraplex.workers import AdapterTooLarge, PoolFull
from loraplex.workers.adapter_pool import AdapterPool
from loraplex.workers.pool_pages import BlockLayout, Pages
from loraplex.workers.shard import Shard


def numpy_to_float(array):
    if array.dtype == "uint16":
        return torch.from_numpy(array.astype("int16", copy=True)).view(torch.bfloat16).float()
    return torch.from_numpy(array.copy()).float()


def make_pool(demo, tp=(0, 1), nbytes=16 << 20, **options) -> AdapterPool:
    model = demo.config().model
    return AdapterPool(
        model, Shard(model, *tp), nbytes, torch.float32, torch.device("cpu"), 8, **options
    )


def check_slot(pool: AdapterPool, slot: int, pack: Pack, shard: Shard) -> None:
    model, tp = shard.model, (shard.rank, shard.size)
    for layer in pack.layers:
        homes = pool._dense_homes(layer.index)
        for name, tables, p in homes:
            in_size = shard.q_size if name == "o_proj" else model.hidden_size
            factors = gather_dense_factors(tables, slot, p, in_size)
            if name not in layer.dense:
                assert factors is None
                continue
            lo, hi = shard.rows(name)
            a, b = pack.dense_a(layer, name), pack.dense_b(layer, name)
            a, b = numpy_to_float(a), numpy_to_float(b)
            assert torch.equal(factors.a, a[lo:hi].T if name == "o_proj" else a)
            assert torch.equal(factors.b, b if name == "o_proj" else b[lo:hi])
            assert factors.scale == pytest.approx(layer.dense[name].scale, rel=1e-6)
        ids = layer.experts.ids if layer.experts else ()
        for expert in range(model.num_experts):
            found = gather_factors(
                pool.experts[layer.index], slot, expert, model.hidden_size, shard.intermediate
            )
            if expert not in ids:
                assert found == (None, None, None)
                continue
            i = ids.index(expert)
            for part, factors in zip(("gate", "up"), found, strict=False):
                if factors is not None:
                    b = numpy_to_float(pack.b13(layer, i, part, *tp))
                    assert torch.equal(factors.b, b)
            a2, b2 = pack.a2(layer, i, *tp), pack.b2(layer, i)
            assert torch.equal(found[2].a, numpy_to_float(a2).T)
            assert torch.equal(found[2].b, numpy_to_float(b2))


@pytest.mark.parametrize("tp", [(0, 1), (1, 2), (3, 4)])
def test_loads_and_unloads_in_any_order_keep_every_factor(demo, tp):
    pool = make_pool(demo, tp, poison=True)
    shard = Shard(demo.config().model, *tp)
    packs = [Pack.open(p) for p in demo.packs.paths.values()]
    resident: dict[int, Pack] = {}
    rng = random.Random()
    for _ in range(14):
        slot = rng.randrange(8)
        if slot in resident:
            pool.unload(slot)
            del resident[slot]
        else:
            pack = rng.choice(packs)
            assert pool.load(slot, pack) == pool.required_bytes(pack)
            resident[slot] = pack
        assert pool.used_bytes == sum(pool.required_bytes(p) for p in resident.values())
        for s, pack in resident.items():
            check_slot(pool, s, pack, shard)
    for slot in list(resident):
        pool.unload(slot)
    assert pool.used_bytes == 0
    for tables in pool.experts:
        assert (tables.offset_a13 == -1).all()
        assert (tables.rank == 0).all()


def test_freed_pages_are_poisoned(demo):
    pool = make_pool(demo, poison=True)
    pool.load(0, Pack.open(next(iter(demo.packs.paths.values()))))
    pages = pool.used_bytes // 4
    pool.unload(0)
    assert pool.buffer.isnan().sum() == pages


def test_full_and_too_large_say_the_sizes_and_change_nothing(demo):
    pack = Pack.open(demo.packs.paths[demo.refs["whaler"].key])
    pool = make_pool(demo, nbytes=4 << 20)
    pool.load(0, pack)
    used = pool.used_bytes
    with pytest.raises(PoolFull, match="are free"):
        pool.load(1, pack)
    assert pool.used_bytes == used
    with pytest.raises(AdapterTooLarge, match="raise pool_bytes"):
        make_pool(demo, nbytes=1 << 20).check_fits(pack)


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(16, 100))
def test_blocks_of_a_layout_lie_in_their_runs_without_overlap(sizes, page):
    layout = BlockLayout(sizes, page)
    end_of: dict[int, int] = {}
    for (run, offset), size in zip(layout.places, sizes, strict=True):
        assert offset >= end_of.get(run, 0)
        end_of[run] = offset + size
        assert end_of[run] <= layout.runs[run] * page


@settings(max_examples=200)
@given(
    st.integers(1, 30), st.lists(st.lists(st.integers(1, 5), max_size=6), max_size=15), st.data()
)
def test_pages_are_never_shared_and_all_come_back(total, wishes, data):
    pages = Pages(total)
    held: list[list[tuple[int, int]]] = []
    for runs in wishes:
        starts = pages.allocate(runs)
        if starts is None:
            assert pages.free < sum(runs) or max(runs) > 1
            if held:
                for first, n in held.pop(data.draw(st.integers(0, len(held) - 1))):
                    pages.release(first, n)
        else:
            held.append(list(zip(starts, runs, strict=True)))
        taken = [p for runs in held for first, n in runs for p in range(first, first + n)]
        assert len(taken) == len(set(taken)) == total - pages.free
        assert all(0 <= p < total for p in taken)
    for runs in held:
        for first, n in runs:
            pages.release(first, n)
    assert pages.allocate([total]) == [0]
