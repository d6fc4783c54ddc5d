"""Loraplex's engine alone, in this process, for benchmarks/serving.py."""

from __future__ import annotations

import time
from pathlib import Path

from _local_packs import LocalPacks
from _serving_load import NEW_TOKENS, DemoFacts, Round
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams

_TENANT = "bench"


class EngineAlone:
    """One engine over the demo model; close it at the end."""

    def __init__(self, demo: DemoFacts, folder: Path, threads: int):
        base = BaseModel.from_folder(demo.model, demo.base_name)
        self._refs: dict[str | None, AdapterRef | None] = {None: None}
        paths: dict[str, Path] = {}
        for name, source in demo.adapters.items():
            path = folder / f"{name}.pack"
            config = (source / "adapter_config.json").read_bytes()
            info = make_pack(config, source / "adapter_model.safetensors", base, path)
            ref = self._refs[name] = AdapterRef(_TENANT, info.digest)
            paths[ref.key] = path
        config = EngineConfig(
            str(demo.model), base_fingerprint=base.fingerprint, torch_threads=threads
        )
        self._engine = Engine(config, LocalPacks(paths))

    def run(self, round_: Round) -> tuple[list[list[int]], float]:
        """Submits the whole round at once. Answers by request, and seconds."""
        params = SamplingParams(
            max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
        )
        answers: list[list[int]] = [[] for _ in round_.requests]
        began = time.perf_counter()
        for i, r in enumerate(round_.requests):
            ref = self._refs[r.adapter]
            self._engine.submit(GenerationRequest(str(i), r.prompt, params, _TENANT, ref))
        while self._engine.has_work():
            for out in self._engine.step():
                answers[int(out.request_id)] += out.token_ids
                if out.error is not None:
                    raise RuntimeError(f"request {out.request_id}: {out.error}")
        return answers, time.perf_counter() - began

    def close(self) -> None:
        self._engine.close()
