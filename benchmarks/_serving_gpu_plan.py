"""What benchmarks/serving_gpu.py serves: a model's folder, an adapter's file, and the settings that
engine and service share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from _engine_run import LARGE, TINY, Shape, adapter_elements
from _serving_load import DEMO

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEMPERATURE = 1.0  # greedy answers of random weights go round in circles, through few experts
_FIRST_PLAIN_TOKEN = 4  # those below are special
_BF16 = 2  # bytes
_BLOCK = 16  # tokens of a block of the KV cache


@dataclass(frozen=True)
class Plan:
    """One run: `streams` requests at once, of which each adapter gets as many, round after round.

    Args:
        folder: where everything is written.
        tokens: new ones of each answer.
        settings: beyond those below, as `name=value` on the command line has them.
    """

    shape: Shape
    folder: Path
    device: str
    adapters: int
    streams: int
    tokens: int
    tenants: int
    rounds: int
    gateways: int
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def tiny(cls, folder: Path, device: str) -> Plan:
        shape = replace(TINY, config={**TINY.config, "vocab_size": _demo_vocab()})
        return cls(shape, folder, device, 4, 8, 32, tenants=2, rounds=3, gateways=1)

    @classmethod
    def large(cls, folder: Path, device: str) -> Plan:
        return cls(LARGE, folder, device, 32, 64, 256, tenants=8, rounds=8, gateways=4)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def pack(self) -> Path:
        return self.folder / "engine.pack"

    @cached_property
    def adapter_bytes(self) -> int:
        """Of its file's numbers, in bfloat16."""
        return adapter_elements(self.shape) * _BF16

    @property
    def disk_bytes(self) -> int:
        """Written in all: each adapter to the quarantine, and as source and pack to the store;
        copies that ingest and ranks take for a while."""
        return (3 * self.adapters + 2 * _INGESTS + 8) * self.adapter_bytes + (1 << 30)

    def all_settings(self) -> dict[str, str]:
        """Of the service, and of the engine alone as far as it has them."""
        width = 2 if self.shape.config["torch_dtype"] == "float32" else 1  # in the pool, of bf16
        context = self.shape.prompt + self.tokens + _BLOCK
        values = {
            "model_path": str(self.model),
            "served_model_name": "bench",
            "load_format": "dummy",
            "device": self.device,
            "groups": 1,
            "gateway_replicas": self.gateways,
            "max_running": self.streams,
            "max_batch_tokens": self.shape.max_batch_tokens,
            # For twice the streams, so that none waits for blocks that cached prefixes hold.
            "kv_tokens": 2 * self.streams * -(-context // _BLOCK) * _BLOCK,
            "max_context": 2048,  # as in benchmarks/engine.py
            "pool_bytes": (self.adapters + 1) * (self.adapter_bytes * width + (16 << 20)),
            # All adapters stay in the pool, so nothing is kept in memory besides.
            "host_cache_bytes": 0,
            "disk_cache_bytes": 6 * self.adapter_bytes + (64 << 20),
            "ingest_concurrency": _INGESTS,
            "torch_threads": 1 if self.device == "cpu" else 8,
            "drain_s": 0,
        }
        return {name: str(value) for name, value in values.items()} | self.settings

    def prompts(self) -> list[list[int]]:
        """Of one round: random, so no prefix is known."""
        vocab = range(_FIRST_PLAIN_TOKEN, self.shape.config["vocab_size"])
        return [random.choices(vocab, k=self.shape.prompt) for _ in range(self.streams)]

    def write_model(self) -> None:
        """config.json, and the demo's tokenizer with as many tokens more as the model has: each
        stands for text, or its event would be left out of the stream."""
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(self.shape.config))
        tokenizer = json.loads((DEMO / "model/tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        # None of the demo's own tokens has more than one digit.
        more = range(len(vocab), self.shape.config["vocab_size"])
        vocab |= {f"{number:06x}": number for number in more}
        (self.model / "tokenizer.json").write_text(json.dumps(tokenizer))

    def write_adapter(self) -> None:
        """Random, in PEFT's form of one tensor per expert and factor."""
        self.adapter.mkdir()
        config = json.loads((DEMO / "adapters/scripture" / CONFIG).read_text())
        config |= {"r": self.shape.rank, "base_model_name_or_path": None}
        (self.adapter / CONFIG).write_text(json.dumps(config))
        header: dict[str, Any] = {}
        place = 0
        for name, shape in _tensors(self.shape):
            end = place + shape[0] * shape[1] * _BF16
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
            place = end
        assert place == self.adapter_bytes
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        # Signs and mantissas at random; magnitudes of about 0.01.
        bits = np.random.default_rng(0).integers(0, 1 << 16, place // _BF16, np.uint16)
        with (self.adapter / WEIGHTS).open("wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            (bits & 0x807F | 0x3C00).tofile(file)


_INGESTS = 8  # uploads that are checked at once


def _demo_vocab() -> int:
    return json.loads((DEMO / "model/config.json").read_text())["vocab_size"]


def _tensors(shape: Shape) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of an adapter on attention and on all experts."""
    c, r = shape.config, shape.rank
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    q, kv = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    expert = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    for layer in range(c["num_hidden_layers"]):
        where = f"base_model.model.model.layers.{layer}"
        modules = {f"{where}.self_attn.{name}": size for name, size in attention.items()}
        for e in range(c["num_experts"]):
            modules |= {f"{where}.mlp.experts.{e}.{name}": size for name, size in expert.items()}
        for module, (out, in_) in modules.items():
            yield f"{module}.lora_A.weight", [r, in_]
            yield f"{module}.lora_B.weight", [out, r]
