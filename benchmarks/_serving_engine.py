"""Loraplex's engine alone, in this process, for benchmarks/serving.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _local_packs import LocalPacks
from _serving_load import NEW_TOKENS, DemoFacts, Round
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams

_TENANT = "bench"

# Adapter or base model, prompt, what was generated before, and how.
Asked = tuple[str | None, tuple[int, ...], tuple[int, ...], SamplingParams]


class EngineAlone:
    """One engine over the demo model; close it at the end.

    Args:
        folder: for the adapters' packs.
        settings: others than the engine's own defaults.
    """

    def __init__(self, demo: DemoFacts, folder: Path, **settings: Any):
        base = BaseModel.from_folder(demo.model, demo.base_name)
        self._refs: dict[str | None, AdapterRef | None] = {None: None}
        paths: dict[str, Path] = {}
        for name, source in demo.adapters.items():
            path = folder / f"{name}.pack"
            config = (source / "adapter_config.json").read_bytes()
            info = make_pack(config, source / "adapter_model.safetensors", base, path)
            ref = self._refs[name] = AdapterRef(_TENANT, info.digest)
            paths[ref.key] = path
        config = EngineConfig(str(demo.model), base_fingerprint=base.fingerprint, **settings)
        self._engine = Engine(config, LocalPacks(paths))

    def run(self, round_: Round) -> tuple[list[list[int]], float]:
        """Submits the whole round at once. Answers by request, and seconds."""
        params = SamplingParams(
            max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
        )
        began = time.perf_counter()
        answers = self.generate([(r.adapter, r.prompt, (), params) for r in round_.requests])
        return answers, time.perf_counter() - began

    def generate(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Submits all at once. Each one's new tokens.

        Raises:
            RuntimeError: one has failed.
        """
        answers: list[list[int]] = [[] for _ in asked]
        for i, (adapter, prompt, output, params) in enumerate(asked):
            ref = self._refs[adapter]
            request = GenerationRequest(str(i), prompt, params, _TENANT, ref, output)
            self._engine.submit(request)
        while self._engine.has_work():
            for out in self._engine.step():
                answers[int(out.request_id)] += out.token_ids
                if out.error is not None:
                    raise RuntimeError(f"request {out.request_id}: {out.error}")
        return answers

    def close(self) -> None:
        self._engine.close()
