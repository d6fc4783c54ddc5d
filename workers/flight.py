"""A launched step: on the device, its results not read yet."""

from __future__ import annotations

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


@dataclass
class StepResult:
    """What a step came to."""

    drawn: Sample | None  # rows in the order of `Plan.drawing`; None where nothing was drawn
    prompts: list[list[TokenLogprob]]  # in the order of `Plan.prompts`


@torch.inference_mode()
def launch(runner: ModelRunner, plan: Plan) -> Callable[[], StepResult]:
    """Runs a planned step and samples, all on the device.

    Returns:
        What waits for the result.
    """
    logits = runner.run(plan.step)
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
        )

    return wait
