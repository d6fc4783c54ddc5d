"""What the controller wants in a node's memory comes there before anybody asks, and stays."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from loraplex.adapter_store import DiskTier, HostTier, ObjectStore
from loraplex.workers import AdapterRef
from loraplex.workers.pool.host_keeper import HostKeeper

from tests.adapter_store.faults import FaultyStore
from tests.adapter_store.stored_packs import MIB, TENANT, pack_key, store_pack


@dataclass
class Node:
    store: FaultyStore
    tier: HostTier
    keeper: HostKeeper
    refs: list[AdapterRef]
    now: float = 0.0

    def here(self) -> set[AdapterRef]:
        return {ref for ref in self.refs if ref.key in self.tier.host_resident()}


@pytest.fixture
def node(store: ObjectStore, tmp_path: Path, monkeypatch) -> Iterator[Node]:
    """Memory for two of its four packs, both of which may be kept."""
    monkeypatch.setattr("loraplex.workers.pool.host_keeper._LOOK_S", 0.02)
    digests = [store_pack(store, tmp_path / "made", seed, mib=0.9) for seed in range(4)]
    faulty = FaultyStore(store)
    shm = Path("/dev/shm") / f"loraplex-test-{os.getpid()}-{time.time_ns()}"
    disk = DiskTier(tmp_path / "disk", faulty, 64 * MIB)  # type: ignore[arg-type]
    tier = HostTier(disk, 2 * MIB, shm / "arena", keep_bytes=2 * MIB)
    keeper = HostKeeper(tier, clock=lambda: node.now)
    node = Node(faulty, tier, keeper, [AdapterRef(TENANT, digest) for digest in digests])
    yield node
    keeper.close()
    tier.close()
    shutil.rmtree(shm, ignore_errors=True)


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kept_packs_come_and_requests_dont_drive_them_out(node):
    a, b, c, d = node.refs
    node.keeper.keep([a, b])
    until(lambda: node.here() == {a, b})
    for ref in (c, d):
        path, _ = node.tier.ensure(ref.tenant_id, ref.digest)
        assert path.parent.parent.name == "disk"
    assert node.here() == {a, b}
    node.keeper.keep([c])
    until(lambda: node.tier._arena.kept.names() == {c.key})
    until(lambda: c in node.here())
    node.keeper.keep([])
    until(lambda: not node.tier._arena.kept.names())


def test_what_has_left_although_it_is_kept_is_brought_back(node):
    a, *_ = node.refs
    node.keeper.keep([a])
    until(lambda: node.here() == {a})
    node.tier.remove(a.key)
    time.sleep(0.1)
    assert not node.here()  # not in a hurry: whoever removed it may be at it
    node.now = 31.0
    until(lambda: node.here() == {a})


def test_one_that_fails_keeps_no_other_back_and_is_tried_again_later(node):
    a, b, *_ = node.refs
    node.store.fail = lambda action, key: a.digest in key
    node.keeper.keep([a, b])
    until(lambda: node.here() == {b})
    node.store.fail = lambda action, key: False
    time.sleep(0.1)
    assert node.here() == {b}
    node.now = 31.0
    until(lambda: node.here() == {a, b})


def test_a_deleted_adapter_is_kept_no_longer_and_doesnt_come_back(node):
    a, b, *_ = node.refs
    node.keeper.keep([a, b])
    until(lambda: node.here() == {a, b})
    node.keeper.forget(a.key)
    node.tier.remove(a.key)
    until(lambda: node.tier._arena.kept.names() == {b.key})
    node.now = 31.0
    time.sleep(0.1)
    assert node.here() == {b}


def test_other_advice_and_the_end_cut_a_slow_fetch_short(node):
    a, b, *_ = node.refs
    node.store.download_delay_s = 0.3  # a part; not all of them begin before the other advice
    node.keeper.keep([a])
    until(lambda: pack_key(a.digest) in node.store.downloads)
    node.store.download_delay_s = 0.0
    node.keeper.keep([b])
    until(lambda: b in node.here())
    thread = node.keeper._thread
    node.keeper.close()
    thread.join(5)
    assert not thread.is_alive()
    assert node.keeper._thread is None
