"""Who comes into the pool, who goes for it, and what becomes of loads that fail."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.adapter_store import Pack, write_pack
from loraplex.workers import AdapterRef
from loraplex.workers.pool.adapter_pool import AdapterPool
from loraplex.workers.pool.packs import PackFetcher
from loraplex.workers.pool.residency import Residency, Waiting
from loraplex.workers.pool.stager import CpuStager, Transfer
from loraplex.workers.shard import Shard

from tests.adapters import random_canonical, tiny_base_model

from .conftest import TENANT, LocalPacks
from .test_loading import model_like

BASE = tiny_base_model(num_experts=6, num_layers=3, moe_intermediate=32)


class Node:
    """A pool, and packs on this node's disk of so many pages each (of 16 KiB)."""

    def __init__(self, demo: Any, folder: Path, pool_pages: int):
        model = model_like(demo)
        device = torch.device("cpu")
        self.pool = AdapterPool(
            model, Shard(model), pool_pages << 14, torch.float32, device, 8, poison=True
        )
        self.packs, self.folder, self.now = LocalPacks(), folder, 0.0
        self.residency = Residency(
            self.pool, PackFetcher(self.packs, 1), None, 3, clock=lambda: self.now
        )

    def adapter(self, rank: int) -> AdapterRef:
        path = self.folder / f"{len(self.packs.paths)}"
        write_pack(path, random_canonical(BASE, len(self.packs.paths), rank))
        ref = AdapterRef(TENANT, Pack.open(path).digest)
        self.packs.paths[ref.key] = path
        return ref

    def step(self) -> None:
        self.residency.settle()
        self.residency.prefetch()
        time.sleep(0.001)

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline
            self.step()

    def hold(self, ref: AdapterRef) -> int:
        """As a request that is admitted as soon as it can be."""
        while True:
            try:
                return self.residency.acquire(ref)[0]
            except Waiting:
                self.step()

    def resident(self) -> set[str]:
        return set(self.residency.resident())


@pytest.fixture
def make_node(demo, tmp_path):
    nodes: list[Node] = []

    def make(pool_pages: int) -> Node:
        nodes.append(Node(demo, tmp_path, pool_pages))
        return nodes[-1]

    yield make
    for node in nodes:
        node.residency.close()


def pages_of(node: Node, ref: AdapterRef) -> int:
    return node.pool.required_bytes(Pack.open(node.packs.paths[ref.key])) >> 14


def test_nothing_is_evicted_for_what_has_no_room_all_the_same(make_node):
    probe = make_node(64)
    small_pages, large_pages = (pages_of(probe, probe.adapter(rank)) for rank in (2, 8))
    node = make_node(large_pages + small_pages)
    idle, used, large = node.adapter(2), node.adapter(4), node.adapter(8)
    assert pages_of(node, used) > small_pages
    node.residency.release(node.hold(idle))
    held = node.hold(used)

    def waits_for_room() -> bool:
        with pytest.raises(Waiting) as waiting:
            node.residency.acquire(large)
        return waiting.value.for_room

    node.until(waits_for_room)
    for _ in range(5):
        assert waits_for_room()
    assert node.resident() == {idle.key, used.key}
    assert node.residency.counts.evictions == 0
    node.residency.release(held)
    node.residency.release(node.hold(large))
    assert large.key in node.resident()


def test_what_is_held_says_how_large_it_is(make_node):
    node = make_node(64)
    for rank in (3, 8):
        ref = node.adapter(rank)
        slot = node.hold(ref)
        assert node.residency.size(slot) == (pages_of(node, ref) << 14, rank)


def test_two_that_wait_for_room_come_one_after_the_other(make_node):
    probe = make_node(64)
    pages = pages_of(probe, probe.adapter(8))
    node = make_node(pages + pages // 2)
    first, second = node.adapter(8), node.adapter(8)
    waiting, done = deque([first, second]), []
    deadline = time.monotonic() + 10
    while waiting:
        assert time.monotonic() < deadline
        for ref in list(waiting):
            try:
                slot = node.residency.acquire(ref)[0]
            except Waiting:
                continue
            waiting.remove(ref)
            done.append(ref)
            node.residency.release(slot)
        assert node.pool.used_bytes <= pages << 14
        node.step()
    assert sorted(r.key for r in done) == sorted([first.key, second.key])


def test_a_queued_requests_adapter_comes_into_the_pool_before_it_is_asked_for(make_node):
    node = make_node(64)
    ref = node.adapter(4)
    node.residency.want(ref)
    node.until(lambda: node.resident() == {ref.key})
    assert node.residency.acquire(ref)[1] == "disk"
    assert node.residency.acquire(ref)[1] == "gpu"


def test_what_a_queued_request_wants_doesnt_drive_out_what_others_wait_for(make_node):
    probe = make_node(64)
    node = make_node(pages_of(probe, probe.adapter(8)) + 1)
    first, second = node.adapter(8), node.adapter(8)
    node.residency.want(first)
    node.until(lambda: node.resident() == {first.key})
    node.residency.want(second)
    node.until(lambda: second.key in node.residency._no_room)
    assert node.resident() == {first.key}
    node.residency.release(node.hold(first))
    node.until(lambda: node.resident() == {second.key})


def test_a_prefetch_that_failed_is_tried_again_after_a_while(make_node):
    node = make_node(64)
    ref = node.adapter(4)
    path = node.packs.paths.pop(ref.key)
    node.residency.set_desired([ref])
    node.until(lambda: not node.residency.prefetch_ready)
    node.packs.paths[ref.key] = path
    for _ in range(5):
        node.step()
    assert node.resident() == set()
    node.now = 31.0
    assert node.residency.prefetch_ready
    node.until(lambda: node.resident() == {ref.key})


def test_a_load_that_fails_is_told_once_and_can_be_tried_again(make_node, monkeypatch):
    node = make_node(64)
    good, bad = node.adapter(4), node.adapter(4)
    move, digest = CpuStager.move, Pack.open(node.packs.paths[bad.key]).digest
    spans = Pack.spans

    def fails(pack: Pack, layer: Any) -> Any:
        if pack.digest == digest:
            raise OSError("unreadable")
        return spans(pack, layer)

    def one_by_one(stager: CpuStager, transfer: Transfer, after: Any) -> Any:
        node.pool._pieces.clear()
        return move(stager, transfer, after)

    monkeypatch.setattr(Pack, "spans", fails)
    monkeypatch.setattr(CpuStager, "move", one_by_one)
    node.hold(good)
    node.residency.want(bad)
    with pytest.raises(OSError, match="unreadable"):
        node.hold(bad)
    assert node.resident() == {good.key}
    assert node.pool.used_bytes == pages_of(node, good) << 14
    assert node.residency.counts.failures == 1
    monkeypatch.setattr(Pack, "spans", spans)
    node.hold(bad)
    assert node.resident() == {good.key, bad.key}


def test_an_adapter_purged_while_it_loads_leaves_when_the_load_has_ended(make_node):
    node = make_node(64)
    ref = node.adapter(4)
    while not node.residency._residents.by_key:
        with pytest.raises(Waiting):
            node.residency.acquire(ref)
    node.residency.purge(ref.key)
    with pytest.raises(Waiting):
        node.residency.acquire(ref)
    node.until(lambda: not node.residency._residents.by_key)
    assert node.pool.used_bytes == 0
    assert [c.what for c in node.residency.take_changes()] == ["load", "unload"]


def test_other_ranks_are_told_to_load_before_they_are_told_to_show(make_node):
    node = make_node(64)
    ref = node.adapter(4)
    slot = node.hold(ref)
    changes = node.residency.take_changes()
    assert [(c.what, c.slot) for c in changes] == [("load", slot), ("show", slot)]
    assert changes[0].path == str(node.packs.paths[ref.key])


class LateStager(CpuStager):
    """A device that is as late as it may be: what it is given happens when it is waited for."""

    def __init__(self, pool: torch.Tensor):
        super().__init__(pool)
        self.queue: deque[Callable[[], object]] = deque()
        self.given = self.waits = 0

    def move(self, transfer: Transfer, after: Any) -> Any:
        stager, move = self, super().move
        self.queue.append(lambda: move(transfer, after))
        self.given += 1  # by the loader's thread alone
        number = self.given

        class Late:
            def query(self) -> bool:
                return stager.waits >= number

            def synchronize(self) -> None:
                while stager.waits < number:
                    stager.queue.popleft()()
                    stager.waits += 1

            wait = synchronize

            def seconds_since(self, earlier: Any) -> float:
                return 1e-3

        return Late()


def test_a_prompt_runs_while_the_last_layers_come(demo, make_engine, run, greedy, monkeypatch):
    """And each layer waits for its own: without that it would read what poison left."""
    prompt = list(range(10, 110))
    ref = demo.refs["whaler"]
    expected = run(make_engine(), [greedy("a", prompt, ref)])["a"]
    monkeypatch.setattr("loraplex.workers.pool.pinned.PinnedMemory.holds", lambda *a: True)
    engine = make_engine()
    pool = engine._runner.pool
    pool.buffer.fill_(torch.nan)
    late = pool._loader.stager = LateStager(pool.buffer)
    engine._residency.speeds.copy_bytes_s = 1e12
    engine._residency.speeds.prefill_token_s = 1.0
    waited: list[int] = []
    await_layer = pool.await_layer

    def noting(layer: int | None = None) -> None:
        await_layer(layer)
        if engine._residency.loads_run:
            waited.append(late.waits)

    monkeypatch.setattr(pool, "await_layer", noting)
    found = run(engine, [greedy("a", prompt, ref)])["a"]
    assert found.last.error is None
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert found.outputs[0].tier == "disk"
    assert waited[0] < waited[-1]  # layers came one after another as the prompt went on
    assert not engine._residency.loads_run
