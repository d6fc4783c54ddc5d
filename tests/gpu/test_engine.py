"""The engine on a GPU: graphs and overlap change no answer, wait for nothing, compile nothing."""

from __future__ import annotations

import random

import pytest
import torch
from loraplex.workers import Engine
from loraplex.workers.comm import Comm
from loraplex.workers.decode_graphs import adapters_bucket
from loraplex.workers.model_runner import ModelRunner
from loraplex.workers.step import SequenceStep, Step

from ..workers.conftest import demo as demo
from ..workers.conftest import drain
from ..workers.test_overlap import random_request
from .layers import NEEDS_GPU

pytestmark = NEEDS_GPU
LIMITS = {
    "device": "cuda",
    "dtype": "float32",
    "max_running": 12,
    "max_batch_tokens": 128,
    "kv_tokens": 4096,
    "max_model_len": 256,
}


@pytest.fixture(scope="module")
def runner(demo) -> ModelRunner:
    torch.backends.cuda.matmul.allow_tf32 = False
    return ModelRunner(demo.config(**LIMITS), Comm())


def decodes(runner: ModelRunner, slots: list[int]) -> Step:
    for part in (runner.cache.k, runner.cache.v):
        part.normal_()
    free = list(range(runner.kv_blocks))
    random.shuffle(free)
    sequences = []
    for slot in sorted(slots):
        start = random.randrange(255)
        blocks, free = free[: start // 16 + 1], free[start // 16 + 1 :]
        sequences.append(SequenceStep([random.randrange(4, 4096)], start, blocks, slot, 0))
    return Step(sequences)


def test_replays_give_what_eager_steps_give(runner, demo):
    from loraplex.adapter_store import Pack

    assert runner.graphs is not None
    for slots in ([-1], [0], [-1] * 3, [-1, 0, 1, 1, 3], [0] * 12, [0, 1, 2, 3] * 3):
        # Adapters come and go under the graphs.
        names = random.sample(sorted(demo.refs), 4)
        for slot, name in enumerate(names):
            path = demo.packs.paths[demo.refs[name].key]
            runner.pool.load(slot, Pack.open(path, verify=False))
        step = decodes(runner, slots)
        kept, runner.graphs = runner.graphs, None
        expected = runner.run(step)
        runner.graphs = kept
        assert (
            kept.bucket(len(slots)),
            adapters_bucket(len(set(slots) - {-1})),
        ) in kept._graphs
        torch.testing.assert_close(runner.run(step), expected, atol=2e-3, rtol=2e-3)
        for slot in range(4):
            runner.pool.unload(slot)


def test_a_decode_step_never_waits_for_the_device(runner):
    from loraplex.workers.request import SamplingParams
    from loraplex.workers.sampling.sampler import sample
    from loraplex.workers.sampling.sampling_batch import Draw, SamplingBatch

    step = decodes(runner, [-1, -1, 0])
    draws = [Draw(SamplingParams(temperature=t, logprobs=1), 9) for t in (0.0, 1.0, 0.7)]

    def launch():
        logits = runner.run(step)
        batch = SamplingBatch.build(draws, logits.shape[1], logits.device)
        sampled = sample(logits, batch)
        runner.keep_sampled(sampled.tokens, 0)
        return sampled.fetch()

    launch().wait()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = launch()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(pending.wait().tokens) == 3


def test_overlap_and_graphs_change_no_answer_and_nothing_compiles(demo):
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = random.Random()
    requests = [random_request(rng, demo, str(i), 100, 40) for i in range(40)]
    got = []
    for changes in ({"overlap": False, "cuda_graphs": False}, {}):
        engine = Engine(demo.config(**LIMITS, **changes), demo.packs)
        for request in requests:
            engine.submit(request)
        got.append(drain(engine))
        assert engine.report().compiles_after_ready == 0, engine._runner.compiles.kernels
        engine.close()
    plain, fast = got
    # Sums in another order may turn a near tie: most answers are the same to the last token.
    same = [plain[r.request_id].tokens == fast[r.request_id].tokens for r in requests]
    assert sum(same) >= 0.9 * len(requests)
    for request in requests:
        a, b = plain[request.request_id], fast[request.request_id]
        if a.tokens == b.tokens:
            assert a.last.finish_reason == b.last.finish_reason
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-3)
