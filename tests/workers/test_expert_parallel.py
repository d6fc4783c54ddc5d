"""Experts split over ranks: the same answers, and each rank holds its own experts alone."""

from __future__ import annotations

import random
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from loraplex.adapter_store import Pack, write_pack
from loraplex.kernels import MoeRunner, backend_for
from loraplex.workers import Engine, PoolFull, run_follower
from loraplex.workers.comm import Comm
from loraplex.workers.config import ModelConfig
from loraplex.workers.errors import ModelUnsupported
from loraplex.workers.models import load_model
from loraplex.workers.pool.adapter_pool import AdapterPool
from loraplex.workers.shard import Shard
from loraplex.workers.weights import Checkpoint

from tests.adapters import random_canonical, tiny_base_model

from .test_adapter_pool import check_slot
from .test_models import requests_for
from .tiny_models import EXPERTS, INTER, make_tiny_model

CPU = torch.device("cpu")
SMALL_POOL = 96 << 10  # bytes: not all adapters fit


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def tiny(request, tmp_path_factory):
    torch.set_num_threads(1)
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 2)])
def test_split_experts_answer_as_whole_ones_with_adapters_of_every_format(
    tiny, tp, ep, run, greedy
):
    config = tiny.config(
        tp_size=tp,
        ep_size=ep,
        rendezvous=f"tcp://127.0.0.1:{free_port()}",
        torch_threads=1,
        pool_bytes=SMALL_POOL,
    )
    _, requests = requests_for(tiny, greedy)
    whole = tiny.engine()
    expected = run(whole, requests)
    whole.close()
    with ProcessPoolExecutor(tp - 1, mp_context=mp.get_context("spawn")) as processes:
        followers = [processes.submit(run_follower, config, rank) for rank in range(1, tp)]
        split = Engine(config, tiny.packs)
        results = run(split, requests)
        evictions = split.report().evictions
        split.close()
        for follower in followers:
            follower.result(20)
    assert evictions > 0  # slots and pages were taken again
    for request_id, result in results.items():
        reference = expected[request_id]
        assert result.last.error is None
        assert result.tokens == reference.tokens
        mine = torch.tensor(result.prompt_logprobs + result.logprobs)
        theirs = torch.tensor(reference.prompt_logprobs + reference.logprobs)
        assert (mine - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 2), (8, 4), (8, 1), (8, 8)])
def test_every_row_of_every_expert_is_on_one_rank_and_parts_of_one_are_neighbours(demo, tp, ep):
    model = demo.config().model
    holders: dict[int, list[tuple[int, int, int]]] = {}
    for rank in range(tp):
        shard = Shard(model, rank, tp, ep)
        assert len(shard.experts) == model.num_experts // ep
        for expert in shard.experts:
            holders.setdefault(expert, []).append((rank, *shard.intermediate_rows()))
    assert sorted(holders) == list(range(model.num_experts))
    part = model.moe_intermediate_size * ep // tp
    for parts in holders.values():
        first = parts[0][0]
        assert first % (tp // ep) == 0
        assert parts == [(first + i, i * part, (i + 1) * part) for i in range(tp // ep)]


def test_sizes_that_dont_divide_are_refused_with_the_sizes(demo):
    model = demo.config().model
    with pytest.raises(ModelUnsupported, match="ep size 3 doesn't divide the tp size 4"):
        Shard(model, 0, 4, 3)
    with pytest.raises(ModelUnsupported, match="ep size 4 doesn't divide num_experts = 6"):
        Shard(replace(model, num_experts=6), 0, 4, 4)
    with pytest.raises(
        ModelUnsupported,
        match=r"tp size 4 / ep size 2 = 2 doesn't divide moe_intermediate_size = 127",
    ):
        Shard(replace(model, moe_intermediate_size=127), 0, 4, 2)
    Shard(replace(model, moe_intermediate_size=127), 0, 4, 4)  # experts are whole


@pytest.mark.parametrize("layout", ["model", "fused"])
def test_a_rank_loads_the_weights_of_its_experts(tiny, layout):
    folder = tiny.folder.parent / layout
    model = ModelConfig.from_folder(folder)
    runner = MoeRunner(backend_for(CPU))
    with Checkpoint(folder, torch.float32, "cpu") as checkpoint:
        whole, *parts = (
            load_model(model, shard, checkpoint, Comm(), runner, 64, CPU)
            for shard in (Shard(model), *(Shard(model, rank, 4, 2) for rank in range(4)))
        )
    first = model.dense_layers
    assert first == (1 if tiny.family == "deepseek_v3" else 0)
    for n, layer in enumerate(whole.layers[first:], first):
        w13 = layer.moe.experts.w13.view(EXPERTS, 2, INTER, -1)
        for rank, part in enumerate(parts):
            experts = slice(rank // 2 * EXPERTS // 2, (rank // 2 + 1) * EXPERTS // 2)
            rows = slice(rank % 2 * INTER // 2, (rank % 2 + 1) * INTER // 2)
            moe = part.layers[n].moe
            assert torch.equal(moe.experts.w13, w13[experts, :, rows].flatten(1, 2))
            assert torch.equal(moe.experts.w2, layer.moe.experts.w2[experts, :, rows])
            ids = [-1] * EXPERTS
            ids[experts] = range(EXPERTS // 2)
            assert moe.local_ids is not None
            assert moe.local_ids.tolist() == ids
            if layer.moe.experts.w2_bias is None:
                assert moe.experts.w2_bias is None
                continue
            bias = layer.moe.experts.w13_bias.view(EXPERTS, 2, INTER)[experts, :, rows]
            assert torch.equal(moe.experts.w13_bias, bias.flatten(1, 2))
            if rank % 2 == 0:  # of the ranks that share its experts, one adds the bias
                assert torch.equal(moe.experts.w2_bias, layer.moe.experts.w2_bias[experts])
            else:
                assert moe.experts.w2_bias is None


# Experts of the first half, of the second, of both; a rank for each projection.
RANKS = {"first": {0: (4, 4, 4), 2: (7, 0, 5)}, "second": {5: (8, 8, 8), 3: (2, 3, 0)}}
RANKS["both"] = RANKS["first"] | RANKS["second"]
ALIKE = dict.fromkeys(range(EXPERTS), (5, 3, 6))


@pytest.fixture
def packs(tmp_path):
    """Adapters of few experts and of all, and the model that they are for."""
    base = tiny_base_model(num_layers=2, num_experts=EXPERTS)
    adapters = {name: {"experts": ranks, "dense": {}} for name, ranks in RANKS.items()}
    adapters["all"] = {"experts": ALIKE, "dense": {}}
    adapters["shared"] = {"experts": ALIKE, "shared_a13": True, "shared_b2": True}
    adapters["dense"] = {"dense": {"q_proj": 3, "o_proj": 4}, "experts": ()}
    opened = {}
    for seed, (name, options) in enumerate(adapters.items()):
        write_pack(tmp_path / name, random_canonical(base, seed, **options))
        opened[name] = Pack.open(tmp_path / name)
    return base, opened


def make_pools(demo, base, nbytes: int, tp: int = 4, ep: int = 2) -> list[AdapterPool]:
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
    return [
        AdapterPool(model, Shard(model, r, tp, ep), nbytes, torch.float32, CPU, 8, poison=True)
        for r in range(tp)
    ]


def test_a_ranks_tables_hold_its_experts_factors(demo, packs):
    base, opened = packs
    pools = make_pools(demo, base, 2 << 20)
    for slot, pack in enumerate(opened.values()):
        for pool in pools:
            pool.load(slot, pack)
            assert pool.experts[0].offset_a13.shape == (8, EXPERTS // 2)
            assert pool.experts[0].rank.shape == (8, EXPERTS // 2, 3)
            for earlier, other in enumerate(list(opened.values())[: slot + 1]):
                check_slot(pool, earlier, other, pool._shard)


def test_a_rank_holds_its_share_of_an_adapters_bytes(demo, packs):
    base, opened = packs
    elements = [
        sum(pool._of(layer).elements.sum() for layer in opened["all"].layers)
        for tp, ep in ((1, 1), (2, 2))
        for pool in make_pools(demo, base, 1 << 20, tp, ep)[:1]
    ]
    assert elements == [elements[0], elements[0] // 2]


def test_what_rank_0_finds_room_for_has_room_on_every_rank(demo, packs):
    """Adapters of one half's experts fill the ranks unevenly; rank 0 sees what others lack."""
    base, opened = packs
    pools = make_pools(demo, base, 4 << 14)  # four pages
    leader = pools[0]
    rng = random.Random()
    resident: dict[int, Pack] = {}
    refused_for_others = 0
    for _ in range(300):
        slot = rng.randrange(8)
        if slot in resident:
            del resident[slot]
            for pool in pools:
                pool.unload(slot)
            continue
        pack = rng.choice(list(opened.values()))
        try:
            leader.load(slot, pack)
        except PoolFull:
            account = leader._account
            own, mine = account.layouts(pack.layers).of_rank[0].runs, account._pages[0]
            starts = mine.allocate(own)
            if starts is not None:
                refused_for_others += 1
                for first, pages in zip(starts, own, strict=True):
                    mine.release(first, pages)
            continue
        resident[slot] = pack
        for pool in pools[1:]:
            pool.load(slot, pack)
        for pool in pools:
            ep_rank = pool._shard.ep_rank
            mine, known = pool._account._pages[ep_rank], leader._account._pages[ep_rank]
            assert mine._free == known._free
            assert pool.used_bytes <= leader.used_bytes
            for loaded, other in resident.items():
                check_slot(pool, loaded, other, pool._shard)
    assert refused_for_others > 0
