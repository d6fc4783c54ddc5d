"""An engine on random weights with random adapters, timed from inside; for benchmarks/engine.py."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _local_packs import LocalPacks
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams
from loraplex.workers.pool.residents import Resident

TENANT = "bench"
_STD = 0.02  # of the factors
_WARM_STEPS = 8  # decode steps that aren't counted


@dataclass(frozen=True)
class Shape:
    """What is measured: Qwen3-30B-A3B's layers, fewer of them; or sizes that a CPU runs."""

    config: dict[str, Any]
    rank: int
    prompt: int  # tokens
    steps: int  # decode steps
    batches: tuple[int, ...]
    adapters: int  # in the pool
    prefill: tuple[int, int]  # requests, tokens of each
    max_batch_tokens: int


_COMMON = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LARGE = Shape(
    config={
        **_COMMON, "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
    },
    rank=16, prompt=128, steps=72, batches=(1, 8, 32, 64), adapters=32, prefill=(16, 1024),
    max_batch_tokens=8192,
)  # fmt: skip
TINY = Shape(
    config={
        **_COMMON, "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
        "max_position_embeddings": 2048, "torch_dtype": "float32",
    },
    rank=16, prompt=24, steps=14, batches=(1, 8), adapters=4, prefill=(4, 64),
    max_batch_tokens=256,
)  # fmt: skip


@dataclass
class Spans:
    """Times of pieces of work: on the device between events, on a CPU by the wall clock."""

    device: torch.device
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, with its time noted at every call."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = work(*args, **kwargs)
            self._events.append((start, self._now()))
            return result

        return timed

    def clear(self) -> None:
        self._events.clear()

    def seconds(self) -> list[float]:
        """Of each call since `clear`."""
        if self.device.type != "cuda":
            return [end - start for start, end in self._events]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in self._events]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _TimedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, spans: Spans):
        self.replay = spans.around(graph.replay)


@dataclass(frozen=True)
class DecodeTimes:
    """Medians over decode steps."""

    forward_us: float  # the graph's replay: all layers, without lm_head and sampling
    step_us: float  # all that a step launches, as the device sees it
    wall_us: float  # from one step's outputs to the next one's


class BenchEngine:
    """One engine; `decode` and `prefill` run whole batches through it."""

    def __init__(self, shape: Shape, folder: Path, device: str, overlap: bool, graphs: bool):
        (folder / "config.json").write_text(json.dumps(shape.config))
        self.shape = shape
        config = EngineConfig(
            str(folder),
            load_format="dummy",
            dtype=shape.config["torch_dtype"],
            device=device,
            kv_tokens=max(
                max(shape.batches) * 2 * (shape.prompt + shape.steps),
                2 * shape.prefill[0] * shape.prefill[1],
            ),
            max_batch_tokens=shape.max_batch_tokens,
            max_running=max(shape.batches),
            max_model_len=2048,
            pool_bytes=_pool_bytes(shape),
            overlap=overlap,
            cuda_graphs=graphs,
        )
        self.engine = Engine(config, LocalPacks())
        self.runner = self.engine._runner
        self.refs = [AdapterRef(TENANT, f"{i:064x}") for i in range(shape.adapters)]
        fill_pool(self.runner.pool, shape)
        _make_resident(self.engine, self.refs, shape.rank)
        self._forward, self._step = Spans(self.runner.device), Spans(self.runner.device)
        if self.runner.graphs is not None:
            captured = self.runner.graphs._graphs
            for key, (graph, hidden) in captured.items():
                captured[key] = _TimedGraph(graph, self._forward), hidden  # type: ignore[assignment]
        else:
            self.runner._forward = self._forward.around(self.runner._forward)
        self.engine._execute = self._step.around(self.engine._execute)
        self._serial = 0

    def decode(self, batch: int, adapters: int) -> DecodeTimes:
        """`shape.steps` decode steps of `batch` sequences over so many adapters (0: base)."""
        self._submit(batch, self.shape.prompt, self.shape.steps + 1, adapters)
        started: set[str] = set()
        while len(started) < batch:  # prefill
            started |= {out.request_id for out in self._outputs()}
        # What is on its way was launched before all had started, or just after.
        self._forward.clear()
        self._step.clear()
        walls, before = [], time.perf_counter()
        while self.engine.has_work():
            outputs = self._outputs()
            now = time.perf_counter()
            if len(outputs) == batch:
                walls.append(now - before)
            before = now
        forward, step = self._forward.seconds(), self._step.seconds()
        if min(len(walls), len(forward), len(step)) <= _WARM_STEPS:
            raise RuntimeError(f"only {len(walls)} decode steps of {batch} sequences were timed")
        return DecodeTimes(*(_median_us(times[_WARM_STEPS:]) for times in (forward, step, walls)))

    def prefill(self, adapters: int) -> float:
        """Tokens per second of prompts, from the first step to the last first token."""
        requests, tokens = self.shape.prefill
        self._submit(requests, tokens, 1, adapters)
        began = time.perf_counter()
        while self.engine.has_work():
            self._outputs()
        return requests * tokens / (time.perf_counter() - began)

    def close(self) -> None:
        self.engine.close()

    def _submit(self, requests: int, prompt: int, output: int, adapters: int) -> None:
        """Requests with prompts that no prefix is known of."""
        params = SamplingParams(max_tokens=output, temperature=1.0, ignore_eos=True)
        vocab = self.shape.config["vocab_size"]
        for i in range(requests):
            self._serial += 1
            ids = tuple(random.randrange(vocab) for _ in range(prompt))
            ref = self.refs[i % adapters] if adapters else None
            self.engine.submit(GenerationRequest(str(self._serial), ids, params, TENANT, ref))

    def _outputs(self) -> list[Any]:
        outputs = self.engine.step()
        for out in outputs:
            if out.error is not None:
                raise RuntimeError(f"request {out.request_id}: {out.error}")
        return outputs


def adapter_elements(shape: Shape) -> int:
    """Elements of one adapter's factors: on q, k, v, o and on all experts, of every layer."""
    c, r = shape.config, shape.rank
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    q, kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    dense = r * (3 * h + q + 2 * kv) + r * (q + h)
    experts = c["num_experts"] * r * (2 * h + 2 * i + i + h)
    return c["num_hidden_layers"] * (dense + experts)


def fill_pool(pool: Any, shape: Shape) -> None:
    """Writes `shape.adapters` random adapters into slots 0, 1, ... of an empty pool."""
    c, r, slots = shape.config, shape.rank, shape.adapters
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    q, kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    place = 0

    def put(table: torch.Tensor, sizes: Iterable[int]) -> None:
        """Blocks of all slots for each column of an offset table [slots, columns]."""
        nonlocal place
        for column, size in enumerate(sizes):
            starts = torch.arange(slots, device=table.device) * size
            table[:slots, column] = place + starts
            place += slots * size

    for layer in range(c["num_hidden_layers"]):
        experts, dense = pool.experts[layer], pool.dense[layer]
        qkv, o = dense["qkv"], dense["o"]
        every = range(c["num_experts"])
        put(experts.offset_a13, (2 * r * h for _ in every))
        put(experts.offset_b13, (2 * r * i for _ in every))
        put(experts.offset_a2, (r * i for _ in every))
        put(experts.offset_b2, (r * h for _ in every))
        put(qkv.offset_a, (r * h,) * 3)
        put(qkv.offset_b, (r * q, r * kv, r * kv))
        put(o.offset_a, (r * q,))
        put(o.offset_b, (r * h,))
        for tables in (experts, qkv, o):
            tables.rank[:slots] = r
            tables.scale[:slots] = 1.0
    if place > pool.buffer.numel():
        raise RuntimeError(f"{place} elements of factors; the pool has {pool.buffer.numel()}")
    pool.buffer[:place].normal_(0, _STD)


def _make_resident(engine: Engine, refs: list[AdapterRef], rank: int) -> None:
    residency = engine._residency
    for slot, ref in enumerate(refs):
        # A user that never goes.
        resident = Resident(ref, slot, nbytes=0, rank=rank, tier="host", fetch_s=0.0, users=1)
        residency._residents.hold(resident)


def _pool_bytes(shape: Shape) -> int:
    itemsize = 4 if shape.config["torch_dtype"] == "float32" else 2
    return (adapter_elements(shape) * shape.adapters + (4 << 20)) * itemsize


def _median_us(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6
