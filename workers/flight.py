"""A launched step: on the device, its results not read yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .host_copies import HostCopy, to_device
from .model_runner import ModelRunner
from .planning import Plan
from .request import TokenLogprob
from .sampling.logprobs import logprob_tensors, to_logprobs
from .sampling.sampler import Sample, SamplingBatch, sample

_Moment = torch.cuda.Event | float  # on a CPU, of `time.perf_counter`


@dataclass
class StepResult:
    """What a step came to."""

    drawn: Sample | None  # rows in the order of `Plan.drawing`; None where nothing was drawn
    prompts: list[list[TokenLogprob]]  # in the order of `Plan.prompts`
    seconds: float = 0.0  # that the model took, where `launch` was to measure it


@torch.inference_mode()
def launch(runner: ModelRunner, plan: Plan, timed: bool = False) -> Callable[[], StepResult]:
    """Runs a planned step and samples, all on the device.

    Args:
        timed: measure the seconds of the model.

    Returns:
        What waits for the result.
    """
    begun = _moment(runner.device) if timed else None
    logits = runner.run(plan.step)
    ended = _moment(runner.device) if timed else None
    prompts: list[tuple[HostCopy, list[int]]] = []
    for p in plan.prompts:
        top = p.seq.request.sampling.prompt_logprobs or 0
        rows = logits[p.row : p.row + len(p.targets)]
        ids = to_device({"ids": np.array(p.targets)}, logits.device)["ids"]
        found = logprob_tensors(rows, ids, top)
        prompts.append((HostCopy(found.tensors()), [top] * len(p.targets)))
    pending = None
    if plan.draws:
        if len(plan.rows) < plan.logit_rows:
            index = to_device({"rows": np.array(plan.rows)}, logits.device)["rows"]
            logits = logits.index_select(0, index)
        batch = SamplingBatch.build(plan.draws, logits.shape[1], logits.device)
        sampled = sample(logits, batch)
        runner.keep_sampled(sampled.tokens, plan.step.shared_ids)
        pending = sampled.fetch()

    def wait() -> StepResult:
        return StepResult(
            drawn=pending.wait() if pending is not None else None,
            prompts=[to_logprobs(copy.wait(), top) for copy, top in prompts],
            seconds=_between(begun, ended),
        )

    return wait


def _moment(device: torch.device) -> _Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(
    begun: torch.cuda.Event | float | None, ended: torch.cuda.Event | float | None
) -> float:
    """0 where nothing was measured, or the device hasn't come there: no result was waited for."""
    if isinstance(begun, float) and isinstance(ended, float):
        return ended - begun
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        return begun.elapsed_time(ended) / 1e3 if ended.query() else 0.0
    return 0.0
