"""The steps that a GPU rank runs before it serves; here on a CPU, where nothing is compiled."""

from __future__ import annotations

import torch
from loraplex.kernels import TUNED_ADAPTERS
from loraplex.workers.comm import Comm
from loraplex.workers.model_runner import ModelRunner
from loraplex.workers.step import SequenceStep, Step


def test_warm_up_leaves_no_trace(demo) -> None:
    config = demo.config(max_batch_tokens=96, max_model_len=40, kv_tokens=256)
    runner = ModelRunner(config, Comm())
    step = Step([SequenceStep([10, 11, 12], 0, [0], -1, 2)])
    before = runner.run(step)
    runner.cache.clear()
    runner.warm_up()
    assert not runner.cache.k.any()
    assert not runner.cache.v.any()
    assert runner.pool.used_bytes == 0
    assert torch.equal(runner.run(step), before)


def test_warm_up_runs_every_size_with_and_without_adapters(demo, monkeypatch) -> None:
    config = demo.config(max_batch_tokens=96, max_model_len=40, kv_tokens=256)
    runner = ModelRunner(config, Comm())
    starts: list[int] = []
    seen: list[tuple[int, int, int | None]] = []

    def run(step: Step, num_adapters: int | None = None) -> None:
        assert max(len(s.token_ids) for s in step.sequences) <= 40
        tokens = sum(len(s.token_ids) for s in step.sequences)
        starts.append(step.sequences[0].start)
        seen.append((tokens, step.sequences[0].slot, num_adapters))

    monkeypatch.setattr(runner, "run", run)
    runner.warm_up()
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96]
    kinds = [(-1, None), *((0, adapters) for adapters in TUNED_ADAPTERS)]
    # Last one token of a sequence as long as may be, whose attention takes several programs.
    assert seen == [*((n, *kind) for n in sizes for kind in kinds), (1, -1, None)]
    assert starts[-1] == 39
