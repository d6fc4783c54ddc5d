"""The engine alone, for benchmarks/serving_gpu.py: as a rank of the service has it, without one."""

from __future__ import annotations

import time
from typing import Any

import torch
from _loading_node import HostPacks
from _serving_gpu_plan import CONFIG, TEMPERATURE, WEIGHTS, Plan
from _serving_gpu_report import latencies
from loraplex.adapter_store import make_pack
from loraplex.cluster.model import base_model
from loraplex.cluster.rank_program import rank_program
from loraplex.cluster.settings import Settings
from loraplex.workers import AdapterRef, Engine, GenerationRequest, SamplingParams

_WARM_ROUNDS = 2


def measure_engine(plan: Plan) -> dict[str, Any]:
    """Rounds of all streams at once, all adapters in the pool. Meant for a process of its own.

    Returns:
        tokens_s of each round, latency_ms of all, and what ran it.
    """
    settings = Settings.load(None, **plan.all_settings())
    base = base_model(settings)
    config = rank_program(settings, base, settings.torch_threads).config
    make_pack((plan.adapter / CONFIG).read_bytes(), plan.adapter / WEIGHTS, base, plan.pack)
    packs = HostPacks(plan.pack)
    # What pages each pack in is the same: all names lead to one.
    refs = [AdapterRef(f"tenant-{i % plan.tenants}", f"{i:064x}") for i in range(plan.adapters)]
    with packs.opened():
        engine = Engine(config, packs)
        _round(engine, plan, refs, 1)  # pages them in
        for _ in range(_WARM_ROUNDS):
            _round(engine, plan, refs, plan.tokens)
        resident = len(engine.report().gpu)
        if resident != plan.adapters:
            raise RuntimeError(f"{resident} of {plan.adapters} adapters are in the engine's pool")
        rounds = [_round(engine, plan, refs, plan.tokens) for _ in range(plan.rounds)]
        report = engine.report()
        engine.close()
    on_gpu = config.device == "cuda"
    return {
        "tokens_s": [plan.streams * plan.tokens / seconds for seconds, _ in rounds],
        "latency_ms": latencies([(0.0, times) for _, streams in rounds for times in streams]),
        "compiles_after_ready": report.compiles_after_ready,
        "machine": torch.cuda.get_device_name() if on_gpu else "CPU",
    }


def _round(
    engine: Engine, plan: Plan, refs: list[AdapterRef], tokens: int
) -> tuple[float, list[list[float]]]:
    """Seconds from the first submit to the last token, and to each token of each request.

    Raises:
        RuntimeError: an answer failed, or has another number of tokens.
    """
    params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True)
    prompts = [tuple(prompt) for prompt in plan.prompts()]
    times: list[list[float]] = [[] for _ in prompts]
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        ref = refs[i % plan.adapters]
        engine.submit(GenerationRequest(str(i), prompt, params, ref.tenant_id, ref))
    now = 0.0
    while engine.has_work():
        outputs = engine.step()
        now = time.perf_counter() - began
        for out in outputs:
            if out.error is not None:
                raise RuntimeError(f"the engine's request {out.request_id}: {out.error}")
            times[int(out.request_id)] += [now] * len(out.token_ids)
    if (counts := {len(each) for each in times}) != {tokens}:
        raise RuntimeError(f"the engine's answers have {sorted(counts)} tokens, not {tokens}")
    return now, times
