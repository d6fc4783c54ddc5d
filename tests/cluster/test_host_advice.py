"""Controller, engines and tiers together: a copy in another node's memory is there before it is
needed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.adapter_store import BaseModel, DiskTier, HostTier, ObjectStore
from loraplex.cluster.control.controller import Controller, ControllerConfig
from loraplex.workers import (
    AdapterRef,
    Engine,
    EngineConfig,
    GenerationRequest,
    GroupReport,
    SamplingParams,
)

from tests.workers.synthetic import store_adapter

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "model"
BASE = BaseModel.from_folder(MODEL, "loraplex-demo")


class Node:
    """A machine of its own with one group."""

    def __init__(self, name: str, store: ObjectStore, folder: Path, shm: Path):
        self.name = name
        self.tier = HostTier(DiskTier(folder / name, store, 64 << 20), 16 << 20, shm / name)
        config = EngineConfig(
            model_path=str(MODEL),
            base_fingerprint=BASE.fingerprint,
            pool_bytes=8 << 20,
            kv_tokens=512,
            torch_threads=1,
        )
        self.engine = Engine(config, self.tier)

    def answer(self, ref: AdapterRef) -> tuple[list[int], str | None]:
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerationRequest("r", (5, 6, 7), params, ref.tenant_id, ref))
        tokens, tier = [], None
        while self.engine.has_work():
            for out in self.engine.step():
                assert out.error is None
                tokens += out.token_ids
                tier = tier or out.tier
                if out.finish_reason:
                    return tokens, tier
        raise AssertionError("no answer")

    def report(self) -> GroupReport:
        return GroupReport("d", self.name, self.name, 1, 2, False, self.engine.report())

    def obey(self, advice: dict) -> None:
        self.engine.set_desired([AdapterRef(*key.split("/")) for key in advice["desired"]])
        if advice["host"] is not None:
            self.engine.keep_on_host([AdapterRef(*key.split("/")) for key in advice["host"]])
        for key in advice["purge"]:
            self.engine.purge(key)

    def close(self) -> None:
        self.engine.close()
        self.tier.close()


@pytest.fixture
def nodes(store: ObjectStore, tmp_path: Path) -> Iterator[list[Node]]:
    shm = Path("/dev/shm") / f"loraplex-test-{os.getpid()}-{time.time_ns()}"
    made = [Node(name, store, tmp_path, shm) for name in ("a", "b")]
    yield made
    for node in made:
        node.close()
    shutil.rmtree(shm, ignore_errors=True)


def test_an_adapter_in_use_on_one_node_comes_to_anothers_memory_and_goes_with_a_purge(
    nodes: list[Node], store: ObjectStore, tmp_path: Path, monkeypatch
):
    # The controller's time runs faster here than that for which other ranks may open a pack.
    monkeypatch.setattr("loraplex.workers.pool.residency.HANDOVER_S", 0.1)
    one, other = nodes
    ref = store_adapter(store, BASE, tmp_path / "made", 1)
    now = 0.0
    controller = Controller(ControllerConfig(), lambda: now, epoch=1)

    def tick() -> None:
        nonlocal now
        for node in nodes:
            node.obey(controller.take(node.report()))
        controller.tick()
        now += 0.5
        time.sleep(0.02)

    deadline = time.monotonic() + 20
    expected, tier = one.answer(ref)
    assert tier == "s3"
    while ref.key not in other.tier.host_resident():
        assert time.monotonic() < deadline
        tick()
        assert one.answer(ref) == (expected, "gpu")
    while list((report := other.engine.report()).host) != [ref.key]:  # listed in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (report.host_bytes_total, report.loads) == (16 << 20, {})
    assert other.answer(ref) == (expected, "host")
    assert other.tier._arena.kept.names() == {ref.key}

    controller.purge([ref.key])
    asked_at = now
    while any(_tiers_of(node, ref.key) for node in nodes):
        assert now - asked_at < 60
        tick()
    assert not any(node.tier._arena.kept.names() for node in nodes)


def _tiers_of(node: Node, key: str) -> list[str]:
    engine = node.engine.report()
    return [tier for tier in ("gpu", "host", "disk") if key in getattr(engine, tier)]
