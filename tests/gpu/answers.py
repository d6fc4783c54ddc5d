"""What engines of several devices and types answer to the same requests, and how far apart."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams

from ..workers.conftest import TENANT, LocalPacks, Result, drain

REQUESTS, TOKENS = 60, 24
Results = dict[str, Result]


def mixed_requests(refs: Iterable[AdapterRef], vocab: int) -> list[GenerationRequest]:
    """Greedy ones with all logprobs: the base model and each adapter in turn."""
    rng = random.Random()
    kinds = [None, *refs]
    params = SamplingParams(
        max_tokens=TOKENS, temperature=0.0, logprobs=8, prompt_logprobs=0, ignore_eos=True
    )
    prompts = [
        tuple(rng.randrange(4, vocab) for _ in range(rng.randrange(2, 60))) for _ in range(REQUESTS)
    ]
    return [
        GenerationRequest(str(i), prompt, params, TENANT, kinds[i % len(kinds)])
        for i, prompt in enumerate(prompts)
    ]


def answers(config: EngineConfig, packs: LocalPacks, requests: list[GenerationRequest]) -> Results:
    engine = Engine(config, packs)
    results = answers_of(engine, requests)
    engine.close()
    return results


def answers_of(engine: Engine, requests: list[GenerationRequest]) -> Results:
    for request in requests:
        engine.submit(request)
    results = drain(engine)
    assert not [r.last.error for r in results.values() if r.last.error]
    return results


def errors(found: Results, expected: Results) -> torch.Tensor:
    """Of the logprobs of all prompts, and of answers as long as they are the same."""
    differences = []
    for key, there in expected.items():
        here = found[key]
        pairs = list(zip(here.prompt_logprobs, there.prompt_logprobs, strict=True))
        n = first_difference(here, there)
        pairs += zip(here.logprobs[:n], there.logprobs[:n], strict=True)
        differences += [abs(a - b) for a, b in pairs]
    return torch.tensor(differences)


def first_difference(here: Result, there: Result) -> int:
    same = [a == b for a, b in zip(here.tokens, there.tokens, strict=True)]
    return [*same, False].index(False)
