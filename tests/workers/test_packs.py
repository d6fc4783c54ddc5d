"""Fetches of many tenants share the threads; pins that went out end by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from loraplex.adapter_store import PackPin
from loraplex.workers import AdapterRef
from loraplex.workers.pool.packs import PackFetcher, close_later


class OneByOne:
    """A source that brings a pack when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Semaphore(0)

    def ensure(self, tenant_id: str, digest: str, wanted: Callable[[], bool]) -> tuple[Path, str]:
        self.begun.append(tenant_id)
        while not self.go.acquire(timeout=0.01):
            if not wanted():
                raise TimeoutError
        return Path(digest), "s3"


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refs(tenant: str, count: int) -> list[AdapterRef]:
    return [AdapterRef(tenant, f"{n:064x}") for n in range(count)]


def test_a_tenant_that_asks_for_many_packs_keeps_no_other_waiting_for_all_of_them():
    source = OneByOne()
    fetcher = PackFetcher(source, 2)  # pyright: ignore[reportArgumentType]
    many, few = refs("many", 20), [*refs("b", 1), *refs("c", 2)]
    for ref in [*many, *few]:
        fetcher.start(ref)
    until(lambda: len(source.begun) == 2)
    for n in range(3, 7):
        source.go.release()
        until(lambda n=n: len(source.begun) == n)
    # Both threads were with the first tenant; then it has its turn with the others.
    assert source.begun == ["many", "many", "b", "c", "many", "c"]
    for ref in many[5:]:
        fetcher.give_up(ref.key)
    for _ in range(20):
        source.go.release()
    until(lambda: not fetcher.loading)
    assert source.begun.count("many") == 5
    found = fetcher.poll(few[0])
    assert found is not None
    assert found.path == Path(few[0].digest)
    fetcher.close()


def test_what_was_given_up_is_fetched_anew_for_the_next_who_asks():
    source = OneByOne()
    fetcher = PackFetcher(source, 1)  # pyright: ignore[reportArgumentType]
    [ref] = refs("a", 1)
    fetcher.start(ref)
    until(lambda: source.begun)
    fetcher.give_up(ref.key)
    fetcher.start(ref)
    until(lambda: len(source.begun) == 2)
    source.go.release()
    until(lambda: not fetcher.loading)
    assert fetcher.poll(ref) is not None
    fetcher.close()


def test_pins_end_in_their_order_in_one_thread_that_ends_too(tmp_path):
    def pin(name: str) -> PackPin:
        (tmp_path / name).touch()
        return PackPin(tmp_path / name)

    def unpinning() -> int:
        return sum(thread.name == "pack-unpin" for thread in threading.enumerate())

    late, many, early = pin("late"), [pin(f"{n}") for n in range(50)], pin("early")
    close_later([late], 0.6)
    for each in many:
        close_later([each], 0.3)
    close_later([early], 0.1)
    assert unpinning() == 1
    until(lambda: early.fd < 0)
    assert all(each.fd >= 0 for each in [late, *many])
    until(lambda: all(each.fd < 0 for each in many))
    assert late.fd >= 0
    until(lambda: late.fd < 0 and not unpinning())
    close_later([again := pin("again")], 0.0)
    until(lambda: again.fd < 0)
