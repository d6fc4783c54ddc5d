"""From the fetch of a pack to its opening by the last rank, nothing takes it from the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from loraplex.adapter_store import DiskTier, FetchCancelled, HostTier, ObjectStore, Pack
from loraplex.workers import AdapterRef
from loraplex.workers.pool.packs import PackFetcher
from loraplex.workers.pool.pool_account import Layouts
from loraplex.workers.pool.residency import Residency, Waiting

from tests.adapter_store.uploads import Service, upload


class OnePackPool:
    """Has room for one adapter. Stands for rank 0's pool."""

    max_slots = 4

    def layouts(self, pack: Pack) -> Layouts:
        return Layouts({}, pack.nbytes, 0)

    def fits(self, layouts: Layouts, without: Iterable[int]) -> bool:
        return True

    def start_load(self, slot: int, pack: Pack, layouts: Layouts) -> Any:
        return SimpleNamespace(
            done=True, launched=True, pinned=False, error=None, seconds=0.1, nbytes=pack.nbytes
        )

    def show(self, slot: int) -> None: ...
    def unload(self, slot: int) -> None: ...


class Rank0:
    """A disk for one pack, and who moves packs from there into the pool."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        service = Service(store, folder / "scratch")
        digests = [service.publish(f"bot-{i}", upload(i)).digest for i in range(2)]
        self.a, self.b = (AdapterRef(service.tenant_id, digest) for digest in digests)
        probe = DiskTier(folder / "probe", store, 1 << 30)
        nbytes = probe.ensure(service.tenant_id, digests[0])[0].stat().st_size
        self.tier = DiskTier(folder / "tier", store, nbytes)
        fetcher = PackFetcher(self.tier, 1)
        pool: Any = OnePackPool()
        self.residency = Residency(pool, fetcher, None)

    def acquire(self, ref: AdapterRef) -> str:
        """The path that the step message names."""
        deadline = time.monotonic() + 10
        while True:
            with suppress(Waiting):
                self.residency.acquire(ref)
            for change in self.residency.take_changes():
                assert change.path is not None
                return change.path
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def rank_0(store: ObjectStore, tmp_path: Path) -> Rank0:
    return Rank0(store, tmp_path)


def test_a_pack_that_a_step_names_is_not_evicted_before_other_ranks_have_opened_it(
    rank_0: Rank0, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.workers.pool.residency.HANDOVER_S", 1.0)
    path = rank_0.acquire(rank_0.a)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(rank_0.tier.ensure, rank_0.b.tenant_id, rank_0.b.digest)
        time.sleep(0.5)
        assert Pack.open(path).digest == rank_0.a.digest
        rank_0.tier.remove(rank_0.a.key)
        assert Pack.open(path).digest == rank_0.a.digest
        other.result(10)  # the pin has ended
    assert list(rank_0.tier.resident()) == [rank_0.b.key]


class Endless:
    """A source whose fetches go on for as long as they are wanted."""

    def __init__(self) -> None:
        self.running: list[str] = []

    def ensure(self, tenant_id: str, digest: str, wanted: Callable[[], bool]) -> tuple[Path, str]:
        self.running.append(digest)
        while wanted():
            time.sleep(0.01)
        self.running.remove(digest)
        raise FetchCancelled("nobody waits")


def test_a_fetch_ends_with_the_last_request_that_waits_for_it() -> None:
    a, b, c = (AdapterRef("acme", f"{n}" * 64) for n in range(3))
    source: Any = Endless()
    fetcher = PackFetcher(source, 4)
    residency = Residency(cast(Any, OnePackPool()), fetcher, None)
    for ref in (a, b, c):
        residency.want(ref)
    residency.set_desired([b])
    for ref in (a, b):
        residency.give_up(ref.key)
    wait_until(lambda: source.running == [b.digest, c.digest])
    assert sorted(residency.loading) == [b.key, c.key]
    with pytest.raises(Waiting):  # another request asks for it
        residency.acquire(a)
    wait_until(lambda: a.digest in source.running)
    assert residency.counts.failures == 0
    fetcher.close()
    wait_until(lambda: not source.running)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pack_that_was_evicted_before_it_was_used_is_fetched_again(rank_0: Rank0) -> None:
    rank_0.residency.want(rank_0.a)
    deadline = time.monotonic() + 10
    while rank_0.residency.loading:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rank_0.tier.ensure(rank_0.b.tenant_id, rank_0.b.digest)
    assert list(rank_0.tier.resident()) == [rank_0.b.key]
    assert Pack.open(rank_0.acquire(rank_0.a)).digest == rank_0.a.digest
    assert rank_0.residency.counts.failures == 0


def test_ranks_open_what_lies_in_the_nodes_memory(store: ObjectStore, tmp_path: Path) -> None:
    rank_0 = Rank0(store, tmp_path)
    tier = HostTier(DiskTier(tmp_path / "packs", store, 1 << 24), 1 << 20, tmp_path / "memory")
    rank_0.residency = Residency(cast(Any, OnePackPool()), PackFetcher(tier, 1), None)
    pack = Pack.open(rank_0.acquire(rank_0.a))
    assert (pack.digest, pack.arena is not None) == (rank_0.a.digest, True)
    rank_0.residency.settle()
    assert rank_0.residency.counts.loads == {"s3": 1}
    slot, _ = rank_0.residency.acquire(rank_0.a)
    rank_0.residency.release(slot)
    rank_0.residency.purge(rank_0.a.key)
    rank_0.residency.take_changes()
    rank_0.acquire(rank_0.a)
    rank_0.residency.settle()
    assert rank_0.residency.counts.loads == {"s3": 1, "host": 1}
    nbytes = rank_0.residency.resident()[rank_0.a.key]
    assert rank_0.residency.counts.tier_bytes == {"s3": nbytes, "host": nbytes}
    # The fake's copy takes 0.1 s; what is beyond that is the fetch.
    assert min(rank_0.residency.counts.tier_seconds.values()) > 0.1
    tier.close()
