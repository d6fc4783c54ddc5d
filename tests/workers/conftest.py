"""The demo model and its adapters, packed; engines over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.workers import (
    AdapterRef,
    Engine,
    EngineConfig,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TENANT = "acme"


class LocalPacks:
    """Packs that are on this disk already."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}
        self.removed: list[str] = []

    def ensure(self, tenant_id: str, digest: str, wanted: object = None) -> tuple[Path, str]:
        return self.paths[f"{tenant_id}/{digest}"], "disk"

    def resident(self) -> dict[str, int]:
        return {k: p.stat().st_size for k, p in self.paths.items()}

    def host_resident(self) -> dict[str, int]:
        return {}

    host_bytes = 0

    def keep_packs(self, keys: Iterable[str]) -> None:
        raise AssertionError("nobody keeps packs in a memory that there isn't")

    def remove(self, key: str) -> None:
        self.removed.append(key)


@dataclass
class Demo:
    folder: Path
    model: Path
    base: BaseModel
    packs: LocalPacks
    refs: dict[str, AdapterRef]

    def config(self, **changes: object) -> EngineConfig:
        defaults = {
            "model_path": str(self.model),
            "base_fingerprint": self.base.fingerprint,
            "pool_bytes": 32 << 20,
        }
        return EngineConfig(**{**defaults, **changes})  # type: ignore[arg-type]

    def engine(self, **changes: object) -> Engine:
        return Engine(self.config(**changes), self.packs)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    torch.set_num_threads(1)  # several processes may share the cores: barriers would stall
    folder = tmp_path_factory.mktemp("packs")
    base = BaseModel.from_folder(DEMO / "model", "loraplex-demo")
    packs, refs = LocalPacks(), {}
    tenants = json.loads((DEMO / "demo_tenants.json").read_text())["tenants"]
    for adapter in (a for t in tenants for a in t["adapters"]):
        source, path = DEMO / adapter["folder"], folder / f"{adapter['name']}.pack"
        config = (source / "adapter_config.json").read_bytes()
        info = make_pack(config, source / "adapter_model.safetensors", base, path)
        ref = AdapterRef(TENANT, info.digest)
        refs[adapter["name"]] = ref
        packs.paths[ref.key] = path
    return Demo(DEMO, DEMO / "model", base, packs, refs)


@dataclass
class Result:
    """All that came back for one request."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    outputs: list[TokenOutput]

    @property
    def last(self) -> TokenOutput:
        return self.outputs[-1]


Generate = Callable[..., dict[str, Result]]


@pytest.fixture
def make_engine(demo: Demo) -> Iterator[Callable[..., Engine]]:
    """Engines over the demo model, closed at the end."""
    made: list[Engine] = []

    def make(**changes: object) -> Engine:
        made.append(demo.engine(**changes))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def drain(engine: Engine, max_steps: int = 5000) -> dict[str, Result]:
    """Steps until nothing is left; results by request id."""
    results: dict[str, Result] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return results
        for out in engine.step():
            r = results.setdefault(out.request_id, Result([], [], [], []))
            r.tokens += out.token_ids
            r.logprobs += [x.logprob for x in out.logprobs]
            if out.prompt_logprobs is not None:
                r.prompt_logprobs = [x.logprob for x in out.prompt_logprobs if x is not None]
            r.outputs.append(out)
    raise AssertionError(f"work left after {max_steps} steps")


@pytest.fixture
def run() -> Callable[[Engine, Iterable[GenerationRequest]], dict[str, Result]]:
    """Submits requests and runs the engine dry."""

    def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, Result]:
        for request in requests:
            engine.submit(request)
        return drain(engine)

    return run


@pytest.fixture
def greedy() -> Callable[..., GenerationRequest]:
    """Makes a greedy request with logprobs of everything."""

    def make(
        request_id: str, prompt: Iterable[int], ref: AdapterRef | None = None, **sampling: object
    ) -> GenerationRequest:
        defaults: dict[str, object] = {
            "max_tokens": 12, "temperature": 0.0, "logprobs": 0, "ignore_eos": True
        }  # fmt: skip
        params = SamplingParams(**{**defaults, **sampling})  # type: ignore[arg-type]
        return GenerationRequest(request_id, tuple(prompt), params, TENANT, ref)

    return make
