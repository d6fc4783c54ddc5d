"""The engine alone, for benchmarks/serving_gpu.py: as a rank of the service has it, without one."""

from __future__ import annotations

import time
from typing import Any

import torch
from _loading_node import HostPacks
from _serving_gpu_plan import CONFIG, TEMPERATURE, WEIGHTS, Plan
from loraplex.adapter_store import make_pack
from loraplex.cluster.model import base_model
from loraplex.cluster.rank_program import rank_program
from loraplex.cluster.settings import Settings
from loraplex.workers import AdapterRef, Engine, GenerationRequest, SamplingParams

_WARM_ROUNDS = 2


def measure_engine(plan: Plan) -> dict[str, Any]:
    """Rounds of all streams at once, all adapters in the pool. Meant for a process of its own.

    Returns:
        tokens_s of each round, and what ran it.
    """
    settings = Settings.load(**plan.all_settings())
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
        seconds = [_round(engine, plan, refs, plan.tokens) for _ in range(plan.rounds)]
        report = engine.report()
        engine.close()
    on_gpu = config.device == "cuda"
    return {
        "tokens_s": [plan.streams * plan.tokens / s for s in seconds],
        "compiles_after_ready": report.compiles_after_ready,
        "machine": torch.cuda.get_device_name() if on_gpu else "CPU",
    }


def _round(engine: Engine, plan: Plan, refs: list[AdapterRef], tokens: int) -> float:
    """Seconds from the first submit to the last token.

    Raises:
        RuntimeError: an answer failed, or has another number of tokens.
    """
    params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True)
    prompts = [tuple(prompt) for prompt in plan.prompts()]
    counts = [0] * plan.streams
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        ref = refs[i % plan.adapters]
        engine.submit(GenerationRequest(str(i), prompt, params, ref.tenant_id, ref))
    while engine.has_work():
        for out in engine.step():
            if out.error is not None:
                raise RuntimeError(f"the engine's request {out.request_id}: {out.error}")
            counts[int(out.request_id)] += len(out.token_ids)
    seconds = time.perf_counter() - began
    if set(counts) != {tokens}:
        raise RuntimeError(f"the engine's answers have {sorted(set(counts))} tokens, not {tokens}")
    return seconds
