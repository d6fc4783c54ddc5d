"""An engine whose device lags behind as far as it can, with memory that is spoilt when given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from loraplex.workers import Engine
from loraplex.workers.flight import StepResult
from loraplex.workers.planning import Plan


class LaggingEngine(Engine):
    """A step runs only when its result is waited for. Whatever the host changes in between, the
    step sees: real devices are never later than that."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self._queue: deque[Callable[[], None]] = deque()
        self.most_in_flight = 0
        self._runner.pool._poison = True
        _spoil_kv(self)

    def _execute(self, plan: Plan) -> Callable[[], StepResult]:
        results: list[StepResult] = []
        execute = super()._execute
        self._queue.append(lambda: results.append(execute(plan)()))
        self.most_in_flight = max(self.most_in_flight, len(self._queue))

        def wait() -> StepResult:
            while not results:
                self._queue.popleft()()
            return results[0]

        return wait


def _spoil_kv(engine: Engine) -> None:
    """Blocks that are handed out, and those that are given up without a name, hold rubbish. It is
    finite: masked keys have a weight of zero, and zero times NaN would spread."""
    kv, cache = engine._kv, engine._runner.cache
    allocate, release = kv.allocate, kv.release

    def spoil(blocks: list[int]) -> None:
        with torch.inference_mode():
            for part in (cache.k, cache.v):
                part[:, blocks] = 1e3 * torch.randn_like(part[:, blocks])

    def spoiling_allocate(n: int) -> list[int]:
        blocks = allocate(n)
        spoil(blocks)
        return blocks

    def spoiling_release(blocks: list[int]) -> None:
        release(blocks)
        spoil([b for b in blocks if kv._holders[b] == 0 and kv._hash_of[b] is None])

    kv.allocate, kv.release = spoiling_allocate, spoiling_release  # type: ignore[method-assign]
