"""The pool holds exactly a pack's factors, gives every byte back, and frees by poisoning."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex import kernels
from loraplex.adapter_store import BaseModel, CanonicalAdapter, Pack, write_pack
from loraplex.kernels import (
    DenseLoraTables,
    ExpertLoraTables,
    LoraBatch,
    MoeBackend,
    MoeRunner,
    MoeWeights,
    TorchBackend,
    gather_dense_factors,
    gather_factors,
)
from loraplex.kernels.gpu import FusedBackend
from loraplex.kernels.gpu.lora import lora_linear_ as gpu_lora_linear_
from loraplex.workers import AdapterTooLarge, PoolFull
from loraplex.workers.errors import WorkerError
from loraplex.workers.pool.adapter_pool import AdapterPool
from loraplex.workers.pool.pool_pages import BlockLayout, Pages
from loraplex.workers.shard import Shard

from tests.adapters import random_canonical, tiny_base_model


def numpy_to_float(array):
    if array.dtype == "uint16":
        return torch.from_numpy(array.astype("int16", copy=True)).view(torch.bfloat16).float()
    return torch.from_numpy(array.copy()).float()


def make_pool(demo, tp=(0, 1), nbytes=16 << 20, **options) -> AdapterPool:
    model = demo.config().model
    return AdapterPool(
        model, Shard(model, *tp), nbytes, torch.float32, torch.device("cpu"), 8, **options
    )


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Apart from ranks that the pool has added, which hold zeros."""
    rows, columns = expected.shape
    assert torch.equal(found[:rows, :columns], expected)
    assert not found[rows:].any()
    assert not found[:, columns:].any()


def check_slot(pool: AdapterPool, slot: int, pack: Pack, shard: Shard) -> None:
    model, tp = shard.model, (shard.expert_tp_rank, shard.expert_tp)
    for layer in pack.layers:
        for group, p, name in pool._tables._homes(layer.index):
            tables = pool.dense[layer.index][group]
            in_size = shard.q_size if name == "o_proj" else model.hidden_size
            factors = gather_dense_factors(tables, slot, p, in_size)
            if name not in layer.dense:
                assert factors is None
                continue
            lo, hi = shard.rows(name)
            a, b = pack.dense_a(layer, name), pack.dense_b(layer, name)
            a, b = numpy_to_float(a), numpy_to_float(b)
            check_equal(factors.a, a[lo:hi].T if name == "o_proj" else a)
            check_equal(factors.b, b if name == "o_proj" else b[lo:hi])
            assert factors.scale == pytest.approx(layer.dense[name].scale, rel=1e-6)
        ids = layer.experts.ids if layer.experts else ()
        for local, expert in enumerate(shard.experts):
            found = gather_factors(
                pool.experts[layer.index], slot, local, model.hidden_size, shard.intermediate
            )
            if expert not in ids:
                assert found == (None, None, None)
                continue
            i = ids.index(expert)
            gate, up, down = layer.experts.rank[i]
            a13 = numpy_to_float(pack.a13(layer, i))
            rows = {"gate": a13[:gate], "up": a13[-up:]}  # where they share one, it is both
            for part, rank, factors in zip(("gate", "up"), (gate, up), found, strict=False):
                assert (factors is None) == (rank == 0)
                if rank:
                    check_equal(factors.a, rows[part])
                    check_equal(factors.b, numpy_to_float(pack.b13(layer, i, part, *tp)))
            assert (found[2] is None) == (down == 0)
            if down:
                check_equal(found[2].a, numpy_to_float(pack.a2(layer, i, *tp)).T)
                check_equal(found[2].b, numpy_to_float(pack.b2(layer, i)))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("tp", [(0, 1), (1, 2), (3, 4)])
def test_loads_and_unloads_in_any_order_keep_every_factor(demo, tp, multiple):
    pool = make_pool(demo, tp, 48 << 20, rank_multiple=multiple, poison=True)  # room for 8 of any
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
        make_pool(demo, nbytes=1 << 20).layouts(pack)


# Ranks (gate, up, down) by expert; none is a multiple of 8 throughout.
ODD = {0: (3, 5, 1), 2: (8, 9, 7), 3: (0, 2, 0), 4: (17, 0, 12)}
FUSED = {0: (3, 3, 8), 1: (12, 12, 5), 3: (1, 1, 0)}
SAME = dict.fromkeys(range(5), (5, 3, 6))
ADAPTERS: dict[str, dict[str, Any]] = {
    "odd": {"experts": ODD, "dense": {"q_proj": 3, "v_proj": 16, "o_proj": 13}},
    "fused": {"experts": FUSED, "fused_gate_up": True, "dense": {"k_proj": 4, "o_proj": 8}},
    "shared": {"experts": SAME, "shared_a13": True, "shared_b2": True},
}


def odd_adapter(kind: str, dtype: str = "F32") -> CanonicalAdapter:
    base = tiny_base_model(num_layers=1, num_experts=5)
    return random_canonical(base, 7, dtype=dtype, **ADAPTERS[kind])


def pool_for(demo, adapter: CanonicalAdapter, dtype=torch.float32, **options) -> AdapterPool:
    """A pool for the adapter's model, in memory that is NaN throughout."""
    base = adapter.base
    model = replace(
        demo.config().model,
        hidden_size=base.hidden,
        num_layers=base.num_layers,
        num_heads=base.num_heads,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        num_experts=base.num_experts,
        moe_intermediate_size=base.moe_intermediate,
    )
    pool = AdapterPool(model, Shard(model), 1 << 20, dtype, torch.device("cpu"), 4, **options)
    pool.buffer.fill_(torch.nan)
    return pool


def packed(adapter: CanonicalAdapter, folder: Path) -> Pack:
    write_pack(folder / "pack", adapter)
    return Pack.open(folder / "pack")


def tables_of(pool: AdapterPool) -> list[ExpertLoraTables | DenseLoraTables]:
    return [*pool.experts, *(tables for layer in pool.dense for tables in layer.values())]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_padded_ranks_hold_the_same_factors_and_what_the_tables_promise(
    demo, tmp_path, kind, dtype
):
    adapter = odd_adapter(kind, dtype)
    pack = packed(adapter, tmp_path)
    pool_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    pool = pool_for(demo, adapter, pool_dtype, max_rank=20, rank_multiple=8)
    assert pool.load(2, pack) == pool.required_bytes(pack) == pool.used_bytes
    check_slot(pool, 2, pack, pool._shard)
    for tables in tables_of(pool):
        assert (tables.rank_multiple, tables.max_rank) == (8, 24)
        assert int(tables.rank.max()) <= 24
        assert not (tables.rank % 8).any()
        for name in vars(tables):
            if name.startswith("offset_"):
                offsets = getattr(tables, name)
                assert not (offsets[offsets >= 0] % 8).any()


class Step:
    """Tokens of the base model and of slots 0 and 1, through one layer's kernels."""

    def __init__(self, base: BaseModel):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        experts, hidden, inner = base.num_experts, base.hidden, base.moe_intermediate
        self.x = draw(40, hidden) * hidden**0.5
        self.weights = MoeWeights(draw(experts, 2 * inner, hidden), draw(experts, hidden, inner))
        self.topk = draw(40, experts).softmax(-1).topk(3)
        slots = torch.randint(-1, 2, (40,), generator=generator).int().sort().values
        self.batch = LoraBatch(slots, None)

    def experts(self, backend: MoeBackend, tables: ExpertLoraTables | None) -> torch.Tensor:
        ids = self.topk.indices.int()
        batch = None if tables is None else self.batch
        return MoeRunner(backend)(self.x, self.weights, self.topk.values, ids, tables, batch)

    def dense(self, lora_linear_, tables: DenseLoraTables) -> torch.Tensor:
        out = torch.zeros(40, sum(tables.out_sizes))
        lora_linear_(out, self.x, tables, self.batch)
        return out


@pytest.mark.parametrize("kind", ADAPTERS)
def test_padding_changes_no_result(demo, tmp_path, kind):
    adapter = odd_adapter(kind)
    pack = packed(adapter, tmp_path)
    step = Step(adapter.base)

    def results(moe: MoeBackend, lora_linear_, **options) -> list[torch.Tensor]:
        pool = pool_for(demo, adapter, **options)
        pool.load(1, pack)
        dense = [step.dense(lora_linear_, tables) for tables in pool.dense[0].values()]
        return [step.experts(moe, pool.experts[0]), *dense]

    expected = results(TorchBackend(), kernels.lora_linear_)
    padding = {"max_rank": 20, "rank_multiple": 8}
    found = [results(TorchBackend(), kernels.lora_linear_, **padding)]
    if triton.knobs.runtime.interpret:  # these read 16 bytes at a time, as the tables allow
        found.append(results(FusedBackend(), gpu_lora_linear_, **padding))
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    base = step.experts(TorchBackend(), None)
    adapted = step.batch.token_slot == 1
    assert torch.equal(expected[0][~adapted], base[~adapted])
    assert not torch.isclose(expected[0], base)[adapted].all(1).any()


def test_padding_takes_the_bytes_of_the_padded_factors(demo, tmp_path):
    pack = packed(odd_adapter("odd"), tmp_path)
    pool = pool_for(demo, odd_adapter("odd"), rank_multiple=8)
    h, inter, q = 32, 16, 32
    rows = {0: (8, 8, 8), 2: (8, 16, 8), 3: (0, 8, 0), 4: (24, 0, 16)}
    elements = sum((g + u) * (h + inter) + d * (inter + h) for g, u, d in rows.values())
    elements += 8 * (h + q) + 16 * (h + 16) + 16 * (q + h)  # q_proj, v_proj, o_proj
    blocks = pool._blocks.blocks(pack.layers[0], 0)
    assert blocks.elements.sum() == elements
    sizes = pool._blocks.sizes(pack.layers, 0, 4)
    assert sizes.tolist() == [-(-n // 8) * 8 for n in blocks.elements.tolist()]
    assert pool.required_bytes(pack) >= sizes.sum() * 4


def test_an_engine_with_padded_ranks_answers_the_same(demo, make_engine, run, greedy, monkeypatch):
    rng = random.Random(5)
    requests = [
        greedy(name, [rng.randrange(4, 4000) for _ in range(20)], ref, prompt_logprobs=0)
        for name, ref in demo.refs.items()
    ]
    expected = run(make_engine(), requests)

    def padding(*args, **options):
        return AdapterPool(*args, **{**options, "max_rank": 16, "rank_multiple": 8})

    monkeypatch.setattr("loraplex.workers.model_runner.AdapterPool", padding)
    for name, result in run(make_engine(), requests).items():
        assert result.tokens == expected[name].tokens
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        reference = torch.tensor(expected[name].prompt_logprobs + expected[name].logprobs)
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


def test_a_rank_over_the_limit_is_refused_with_the_limit_and_its_setting(demo):
    pack = Pack.open(demo.packs.paths[demo.refs["whaler"].key])
    pool = make_pool(demo, max_rank=12, rank_multiple=8)
    says = "has rank 16, at most 12 is served; raise max_lora_rank"
    with pytest.raises(AdapterTooLarge, match=says):
        pool.layouts(pack)
    with pytest.raises(AdapterTooLarge, match=says):
        pool.load(0, pack)
    assert pool.used_bytes == 0
    make_pool(demo, max_rank=16).layouts(pack)
    for wrong in (0, 257):
        with pytest.raises(WorkerError, match=f"max_lora_rank must be from 1 to 256, got {wrong}"):
            make_pool(demo, max_rank=wrong)


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(16, 100))
def test_blocks_of_a_layout_lie_in_their_runs_without_overlap(sizes, page):
    layout = BlockLayout(sizes, page)
    end_of: dict[int, int] = {}
    for (run, offset), size in zip(layout.places.tolist(), sizes, strict=True):
        assert offset == end_of.get(run, 0)  # nothing is lost between two blocks
        end_of[run] = offset + size
        assert end_of[run] <= layout.runs[run] * page
    assert len(end_of) == len(layout.runs)


def test_small_blocks_fill_what_large_ones_leave():
    """Here each page with a 60 has room for a 40, which comes later."""
    layout = BlockLayout([60, 60, 60, 40, 40, 40], 100)
    assert layout.runs == [1, 1, 1]
    assert layout.places.tolist() == [[0, 0], [1, 0], [2, 0], [0, 60], [1, 60], [2, 60]]


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
