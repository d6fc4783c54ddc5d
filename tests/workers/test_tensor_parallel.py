"""Two gloo ranks give what one rank gives: text and logprobs, with adapters coming and going."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import replace

import pytest
import torch.multiprocessing as mp
from loraplex.workers import Engine, comm, run_follower
from loraplex.workers.config import ModelConfig
from loraplex.workers.errors import ModelUnsupported
from loraplex.workers.shard import Shard


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=[False, True], ids=["one by one", "overlapping"])
def engine_tp2(request, demo):
    config = demo.config(
        tp_size=2,
        rendezvous=f"tcp://127.0.0.1:{free_port()}",
        torch_threads=1,
        pool_bytes=3 << 20,
        overlap=request.param,
    )
    process = mp.get_context("spawn").Process(target=run_follower, args=(config, 1))
    process.start()
    engine = Engine(config, demo.packs)
    yield engine
    engine.close()
    process.join(20)
    assert process.exitcode == 0


def test_tp_2_equals_tp_1(demo, engine_tp2, make_engine, run, greedy):
    """The pool holds about two adapters' halves, so both ranks load and evict in step."""
    rng = random.Random()
    requests = [
        greedy(
            str(i),
            [rng.randrange(4, 4096) for _ in range(rng.randrange(2, 60))],
            ref,
            prompt_logprobs=0,
        )
        for i, ref in enumerate([None, *demo.refs.values()] * 3)
    ]
    expected = run(make_engine(), requests)
    results = run(engine_tp2, requests)
    assert engine_tp2.report().evictions > 0
    for request_id, result in results.items():
        assert result.last.error is None
        assert result.tokens == expected[request_id].tokens
        mine = result.prompt_logprobs + result.logprobs
        reference = expected[request_id].prompt_logprobs + expected[request_id].logprobs
        assert max(abs(a - b) for a, b in zip(mine, reference, strict=True)) <= 1e-3


@pytest.mark.parametrize(("tp", "heads", "kv"), [(2, 4, 2), (4, 2, 1), (8, 1, 1)])
def test_heads_are_cut_and_kv_heads_repeated(demo, tp, heads, kv):
    model = demo.config().model
    rows = [Shard(model, rank, tp).rows("k_proj") for rank in range(tp)]
    for rank in range(tp):
        shard = Shard(model, rank, tp)
        assert (shard.heads, shard.kv_heads) == (heads, kv)
        # A rank's query heads read KV heads that this rank holds.
        group = model.num_heads // model.num_kv_heads
        first = shard.rows("q_proj")[0] // model.head_dim // group
        assert rows[rank][0] == first * model.head_dim


def test_a_tp_size_that_doesnt_divide_is_refused_with_the_sizes(demo):
    model: ModelConfig = demo.config().model
    with pytest.raises(ModelUnsupported, match="num_attention_heads = 8"):
        Shard(model, 0, 3)
    with pytest.raises(ModelUnsupported, match="moe_intermediate_size = 127"):
        Shard(replace(model, moe_intermediate_size=127), 0, 2)


@pytest.mark.parametrize(("host", "given", "expected"), [
    ("127.0.0.1", {}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),
    ("::1", {}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),
    ("localhost", {"NCCL_SOCKET_IFNAME": "ib0"},
     {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}),
    ("10.0.0.7", {}, {}),
    ("node-1", {"GLOO_SOCKET_IFNAME": "eth1"}, {"GLOO_SOCKET_IFNAME": "eth1"}),
])  # fmt: skip
def test_ranks_that_meet_on_loopback_listen_nowhere_else(monkeypatch, host, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    comm._stay_inside(host)
    assert os.environ == expected
