"""transformers + PEFT for benchmarks/serving.py: one request at a time, or batched per adapter."""

from __future__ import annotations

import time
import warnings

import peft
import torch
from _serving_load import NEW_TOKENS, DemoFacts, Round
from transformers import AutoModelForCausalLM

IMPLEMENTATIONS = ("grouped_mm", "eager")
_PROBE_TOKENS = 6


class PeftModels:
    """One model per adapter, all loaded beforehand: PEFT can't hold these formats in one model,
    and so no time for switching is counted against it."""

    def __init__(self, demo: DemoFacts):
        self._models = {name: self._load(demo, name) for name in (None, *demo.adapters)}
        self.implementation = IMPLEMENTATIONS[0]

    @staticmethod
    def _load(demo: DemoFacts, name: str | None) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(demo.model, dtype=torch.float32)
        if name is not None:
            # PEFT warns of patterns that match parameters, which it does apply,
            # and of an attribute of transformers that it reads itself.
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, demo.adapters[name])
        return model.eval()

    def choose_implementation(self, round_: Round) -> dict[str, float]:
        """Times a few tokens of every adapter under each implementation of the experts, and
        keeps the fastest. Returns tokens/s by implementation."""
        sample = list({r.adapter: r for r in round_.requests}.values())
        speeds = {}
        for name in IMPLEMENTATIONS:
            self._use(name)
            for tokens in (2, _PROBE_TOKENS):  # the first is the warm-up
                began = time.perf_counter()
                for request in sample:
                    self._generate(request.adapter, [request.prompt], tokens)
                seconds = time.perf_counter() - began
            speeds[name] = len(sample) * _PROBE_TOKENS / seconds
        self._use(max(speeds, key=lambda name: speeds[name]))
        return speeds

    def one_by_one(self, round_: Round) -> tuple[list[list[int]], dict[str | None, float]]:
        """Answers by request, and the seconds that each adapter's requests took."""
        answers, seconds = [], dict.fromkeys(self._models, 0.0)
        for request in round_.requests:
            began = time.perf_counter()
            answers += self._generate(request.adapter, [request.prompt], NEW_TOKENS)
            seconds[request.adapter] += time.perf_counter() - began
        return answers, seconds

    def per_adapter(self, round_: Round) -> tuple[list[list[int]], float]:
        """Answers by request, and seconds, with all of an adapter's requests in one batch."""
        answers: dict[int, list[int]] = {}
        began = time.perf_counter()
        for name in self._models:
            mine = [i for i, r in enumerate(round_.requests) if r.adapter == name]
            prompts = [round_.requests[i].prompt for i in mine]
            answers.update(zip(mine, self._generate(name, prompts, NEW_TOKENS), strict=True))
        seconds = time.perf_counter() - began
        return [answers[i] for i in range(len(answers))], seconds

    def _use(self, implementation: str) -> None:
        self.implementation = implementation
        for model in self._models.values():
            inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            inner.set_experts_implementation(implementation)

    def _generate(
        self, adapter: str | None, prompts: list[tuple[int, ...]], tokens: int
    ) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._models[adapter].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,  # bans end-of-sequence ids, as Loraplex's min_tokens
                max_new_tokens=tokens,
                do_sample=False,
            )
        return out[:, ids.shape[1] :].tolist()
