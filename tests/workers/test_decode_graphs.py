"""Decode steps in padded buckets, at fixed addresses, give what steps of their own size give.

Here nothing is captured: what a graph would replay is called. tests/gpu captures it.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from loraplex.adapter_store import Pack
from loraplex.workers.comm import Comm
from loraplex.workers.compile_watch import CompileWatch
from loraplex.workers.decode_graphs import adapters_bucket, batch_buckets
from loraplex.workers.model_runner import ModelRunner
from loraplex.workers.step import SequenceStep, Step

from .conftest import drain
from .lagging_engine import LaggingEngine
from .test_overlap import random_request


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (70, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70]),
    ],
)
def test_buckets_end_with_the_most_that_may_run(largest, expected):
    assert batch_buckets(largest) == expected


def test_no_bucket_is_left_out_up_to_large_batches():
    for largest in (100, 256, 1000):
        buckets = batch_buckets(largest)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == largest
        assert max(b - a for a, b in pairwise(buckets)) <= 32


def test_adapters_are_counted_in_the_numbers_that_tiles_are_measured_for():
    assert [adapters_bucket(n) for n in (0, 1, 2, 3, 8, 20, 30, 64, 500)] == [
        0, 1, 1, 8, 8, 8, 64, 64, 64
    ]  # fmt: skip


@pytest.fixture
def runner(demo) -> ModelRunner:
    config = demo.config(kv_tokens=512, max_model_len=64, max_running=8, block_size=16)
    runner = ModelRunner(config, Comm())
    for slot, ref in enumerate(demo.refs.values()):
        runner.pool.load(slot, Pack.open(demo.packs.paths[ref.key], verify=False))
    return runner


def decodes(runner: ModelRunner, slots: list[int]) -> list[SequenceStep]:
    """Sequences of random lengths with blocks of their own, and their random keys and values."""
    for part in (runner.cache.k, runner.cache.v):
        part.normal_()
    free = list(range(runner.kv_blocks))
    random.shuffle(free)
    sequences = []
    for slot in sorted(slots):
        start = random.randrange(63)
        blocks, free = free[: start // 16 + 1], free[start // 16 + 1 :]
        sequences.append(SequenceStep([random.randrange(4, 4096)], start, blocks, slot, 0))
    return sequences


@pytest.mark.parametrize("slots", [[-1] * 3, [-1, 0, 0, 1, 3], [2], [0, 1, 2, 3, -1, -1, 2]])
def test_a_padded_bucket_gives_what_the_step_alone_gives(runner, slots):
    graphs = runner.decode_graphs()
    for _ in range(2):  # the second one finds the first one's rows in the buffers
        sequences = decodes(runner, slots)
        k, v = runner.cache.k.clone(), runner.cache.v.clone()
        expected = runner.run(Step(sequences))
        written_k, written_v = runner.cache.k.clone(), runner.cache.v.clone()
        runner.cache.k.copy_(k)
        runner.cache.v.copy_(v)
        runner.graphs = graphs
        got = runner.run(Step(sequences))
        runner.graphs = None
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
        # Padding wrote nothing: exactly the sequences' own places changed.
        torch.testing.assert_close(runner.cache.k, written_k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runner.cache.v, written_v, atol=1e-5, rtol=1e-5)
        assert int((runner.cache.k != k).any(-1).any(-1).any(0).sum()) == len(slots)


def test_padding_has_no_experts(runner, monkeypatch):
    seen = []
    moe = runner.model.layers[0].moe
    call = type(moe.runner).__call__

    def spy(self, x, weights, topk_weights, topk_ids, *args, **kwargs):
        seen.append(topk_ids)
        return call(self, x, weights, topk_weights, topk_ids, *args, **kwargs)

    monkeypatch.setattr(type(moe.runner), "__call__", spy)
    runner.graphs = runner.decode_graphs()
    runner.run(Step(decodes(runner, [-1, 0, 1])))
    assert len(seen) == len(runner.model.layers)
    for ids in seen:
        assert ids.shape[0] == 4
        assert (ids[:3] >= 0).all()
        assert (ids[3:] == -1).all()


def test_carried_tokens_are_taken_from_the_last_sampled_ids(runner):
    sequences = decodes(runner, [-1, -1, 0])
    tokens = [s.token_ids[0] for s in sequences]
    expected = runner.run(Step(sequences))
    runner.keep_sampled(torch.tensor([tokens[2], 7, tokens[0]]), 0)
    for s, carried in zip(sequences, (2, -1, 0), strict=True):
        if carried >= 0:
            s.token_ids, s.carried = [0], carried
    for graphs in (None, runner.decode_graphs()):
        runner.graphs = graphs
        torch.testing.assert_close(runner.run(Step(sequences)), expected, atol=1e-4, rtol=1e-5)


def test_an_overlapping_engine_with_buckets_answers_as_one_without(demo, make_engine, run):
    rng = random.Random()
    limits = {"max_running": 6, "kv_tokens": 512, "max_model_len": 64}
    requests = [random_request(rng, demo, str(i), 20, 8) for i in range(8)]
    expected = run(make_engine(overlap=False, **limits), requests)
    engine = LaggingEngine(demo.config(overlap=True, **limits), demo.packs)
    engine._runner.graphs = engine._runner.decode_graphs()
    for request in requests:
        engine.submit(request)
    results = drain(engine)
    engine.close()
    for name, result in results.items():
        assert result.tokens == expected[name].tokens
        assert result.last.finish_reason == expected[name].last.finish_reason
        assert result.logprobs == pytest.approx(expected[name].logprobs, abs=1e-4)


def test_compiled_kernels_are_counted_by_name(caplog):
    class Kernel:
        name = "shrink_kernel"

    watch = CompileWatch()
    watch.note(fn=Kernel, repr="shrink_kernel[...]", key="k", compile={}, already_compiled=False)
    assert watch.kernels == ["shrink_kernel"]
    assert "shrink_kernel" in caplog.text
