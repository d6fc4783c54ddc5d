"""Adapters in pinned host memory and an engine that loads them; for benchmarks/loading.py."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _engine_run import Shape
from _local_packs import LocalPacks
from loraplex.adapter_store import (
    BaseModel,
    DenseTarget,
    ExpertFactors,
    LoraFactors,
    Pack,
    canonical_adapter,
    canonical_layer,
    write_pack,
)
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams
from loraplex.workers.pool import residency

TENANT = "bench"


def write_random_pack(shape: Shape, path: Path) -> int:
    """An adapter of bfloat16 on attention and all experts; returns its bytes."""
    c, r = shape.config, shape.rank
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    q, kv = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    layers, experts = c["num_hidden_layers"], c["num_experts"]
    targets = {
        "q_proj": DenseTarget(q, h, "column"),
        "k_proj": DenseTarget(kv, h, "column"),
        "v_proj": DenseTarget(kv, h, "column"),
        "o_proj": DenseTarget(h, q, "row"),
    }
    base = BaseModel(
        name="bench", fingerprint="0" * 64, model_type="qwen3_moe", num_layers=layers, hidden=h,
        num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"], num_experts=experts, moe_intermediate=i, dense_targets=targets,
        moe_layers=tuple(range(layers)), accepted_names=("bench",),
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def factors(out: int, in_: int) -> LoraFactors:
        # Signs and mantissas at random; magnitudes of about 0.01.
        bits = rng.integers(0, 1 << 16, r * (out + in_), np.uint16) & 0x807F | 0x3C00
        return LoraFactors(1.0, bits[: r * in_].reshape(r, in_), bits[r * in_ :].reshape(out, r))

    made = []
    for n in range(layers):
        dense = {name: factors(target.out, target.in_) for name, target in targets.items()}
        each = {
            e: ExpertFactors(gate=factors(i, h), up=factors(i, h), down=factors(h, i))
            for e in range(experts)
        }
        made.append(canonical_layer(n, dense, each))
    return write_pack(path, canonical_adapter(base, made), digest="0" * 64)


class HostPacks(LocalPacks):
    """One pack in host memory under as many names as are asked for."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self.pack = Pack.open(path, verify=False)
        self.pack.memory = self.pack.memory.copy()  # anonymous memory, which can be pinned

    def pin(self, engine: Engine) -> bool:
        return engine._runner.pool.pinned.register(self.pack.memory)

    def ensure(self, tenant_id: str, digest: str, wanted: Any = None) -> tuple[Path, str]:
        path = self._path.with_name(digest)
        if not path.exists():
            path.symlink_to(self._path)
        return path, "host"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Engines get the memory above, and pay for opening the pack all the same."""

        def open_(path: str | Path, verify: bool = True) -> Pack:
            Pack.open(path, verify)
            pack = copy.copy(self.pack)
            pack.path, pack.digest = Path(path), Path(path).name
            return pack

        with mock.patch.object(residency, "Pack") as patched:
            patched.open = open_
            yield


class LoadingEngine:
    """An engine of random weights with room for `shape.adapters` adapters and two more."""

    def __init__(self, shape: Shape, folder: Path, device: str, packs: HostPacks, batch: int):
        (folder / "config.json").write_text(json.dumps(shape.config))
        self.shape, self.packs = shape, packs
        tokens = batch * (shape.prompt + shape.steps + 32) + 8 * shape.prefill[1]
        itemsize = 4 if shape.config["torch_dtype"] == "float32" else 2
        per_adapter = packs.pack.nbytes // 2 * itemsize + (16 << 20)
        config = EngineConfig(
            str(folder),
            load_format="dummy",
            dtype=shape.config["torch_dtype"],
            device=device,
            kv_tokens=-(-tokens // 16) * 16,
            max_batch_tokens=shape.max_batch_tokens,
            max_running=batch,
            max_model_len=shape.config["max_position_embeddings"],
            pool_bytes=(shape.adapters + 2) * per_adapter,
        )
        self.engine = Engine(config, packs)
        self.pool = self.engine._runner.pool
        self.refs = [self.ref(i) for i in range(shape.adapters)]
        self._serial = 0

    @staticmethod
    def ref(n: int) -> AdapterRef:
        return AdapterRef(TENANT, f"{n:064x}")

    def submit(self, ref: AdapterRef | None, prompt: int, output: int) -> None:
        """A greedy request with a prompt that no prefix is known of."""
        self._serial += 1
        vocab = self.shape.config["vocab_size"]
        ids = tuple(random.randrange(vocab) for _ in range(prompt))
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerationRequest(str(self._serial), ids, params, TENANT, ref))

    def outputs(self) -> list[str]:
        """Request ids that got a token in one step."""
        outputs = self.engine.step()
        for out in outputs:
            if out.error is not None:
                raise RuntimeError(f"request {out.request_id}: {out.error}")
        return [out.request_id for out in outputs]

    def drain(self) -> None:
        while self.engine.has_work():
            self.outputs()

    def forget(self, ref: AdapterRef) -> None:
        """Takes an idle adapter out of the pool; it stays in host memory."""
        self.engine.purge(ref.key)

    def wait_for_device(self) -> None:
        if self.pool.buffer.is_cuda:
            torch.cuda.synchronize()
