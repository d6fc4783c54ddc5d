"""A launched step: on the device, its results not read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .logprobs import LogprobRows, read_logprobs
from .model_runner import ModelRunner
from .planning import Plan
from .request import TokenLogprob
from .sampler import sample
from .transfer import Readback, to_device


@dataclass
class StepResult:
    """What a step came to. `drawn` and `finite` are in the order of `Plan.drawing`."""

    drawn: list[int]
    finite: list[bool]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by index into drawn
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)  # as Plan.prompts


@torch.inference_mode()
def launch(runner: ModelRunner, plan: Plan) -> Callable[[], StepResult]:
    """Runs a planned step and samples, all on the device.

    Returns:
        What waits for the result.
    """
    logits = runner.run(plan.step)
    tensors: list[torch.Tensor] = []
    tops: list[list[int]] = []
    for p in plan.prompts:
        ids, top = p.targets, p.seq.request.sampling.prompt_logprobs or 0
        (targets,) = to_device([np.array(ids)], logits.device)
        found = LogprobRows.of(logits[p.row : p.row + len(ids)], targets.long(), [top] * len(ids))
        tensors += found.tensors
        tops.append(found.top)
    asked = [i for i, d in enumerate(plan.draws) if d.params.logprobs is not None]
    if plan.draws:
        if len(plan.rows) < plan.logit_rows:
            logits = _rows(logits, plan.rows)
        finite = logits.isfinite().all(dim=-1)
        raw = logits
        if asked and any(d.banned for d in plan.draws):
            raw = logits.clone()  # banned ids are masked in place
        chosen = sample(logits, plan.draws)
        runner.keep_sampled(chosen, plan.step.shared_ids)
        tensors.append(torch.stack([chosen, finite.to(chosen.dtype)]))
        if asked:
            if len(asked) < len(plan.draws):
                raw, chosen = _rows(raw, asked), _rows(chosen, asked)
            top = [plan.draws[i].params.logprobs or 0 for i in asked]
            tops.append(top)
            tensors += LogprobRows.of(raw, chosen, top).tensors
    readback = Readback(tensors)

    def wait() -> StepResult:
        arrays = iter(readback.wait())
        prompts = [read_logprobs(tops[i], _take(arrays)) for i in range(len(plan.prompts))]
        if not plan.draws:
            return StepResult([], [], prompt_logprobs=prompts)
        drawn, finite = next(arrays).tolist()
        result = StepResult(drawn, [bool(x) for x in finite], prompt_logprobs=prompts)
        if asked:
            result.logprobs = dict(zip(asked, read_logprobs(tops[-1], _take(arrays)), strict=True))
        return result

    return wait


def _take(arrays) -> list[np.ndarray]:
    return [next(arrays) for _ in range(LogprobRows.TENSORS)]


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    (index,) = to_device([np.array(rows)], x.device)
    return x.index_select(0, index)
