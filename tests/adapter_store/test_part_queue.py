"""Parts of all downloads take turns; one that fails or isn't wanted any more ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from loraplex.adapter_store import FetchCancelled
from loraplex.adapter_store.part_queue import PartQueue
from loraplex.adapter_store.single_flight import SingleFlight, always


def test_every_part_runs_once_by_no_more_threads_than_the_budget() -> None:
    queue, lock = PartQueue(helpers=3), threading.Lock()
    ran: list[int] = []
    now = most = 0

    def part(n: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
            ran.append(n)

    for _ in range(3):
        ran.clear()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(queue.run, [[partial(part, i) for i in range(20)] for _ in "ab"]))
        assert sorted(ran) == sorted([*range(20)] * 2)
    assert 3 <= most <= 5  # three helpers, two owners


def test_helpers_take_parts_of_all_downloads_in_turn() -> None:
    queue, order, lock = PartQueue(helpers=2), [], threading.Lock()
    began = threading.Event()

    def part(name: str) -> None:
        began.set()
        time.sleep(0.005)
        with lock:
            order.append(name)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(queue.run, [partial(part, "large")] * 60)
        began.wait()
        queue.run([partial(part, "small")] * 6)
        assert not first.done()
        first.result()
    assert order.index("small") < 15
    assert max(i for i, name in enumerate(order) if name == "small") < 40


def test_a_failed_part_ends_its_download_alone() -> None:
    queue, ran = PartQueue(helpers=2), []

    def part(n: int) -> None:
        time.sleep(0.002)
        ran.append(n)
        if n == 3:
            raise OSError("part 3")

    with pytest.raises(OSError, match="part 3"):
        queue.run([partial(part, n) for n in range(100)])
    assert len(ran) < 20
    queue.run([partial(part, n) for n in range(4, 20)])


def test_what_nobody_wants_any_more_ends() -> None:
    queue, ran = PartQueue(helpers=2), []

    def part() -> None:
        time.sleep(0.002)
        ran.append(1)

    with pytest.raises(FetchCancelled):
        queue.run([part] * 100, wanted=lambda: len(ran) < 5)
    assert len(ran) < 15


def test_a_run_goes_on_while_anybody_waits_and_ends_with_the_last() -> None:
    flights: SingleFlight[int] = SingleFlight()
    going, runs, ended = threading.Event(), [], threading.Event()

    def fetch(wanted, deliver) -> None:
        runs.append(1)
        going.set()
        deadline = time.monotonic() + 10
        while wanted() and time.monotonic() < deadline:
            time.sleep(0.005)
        ended.set()
        raise FetchCancelled("nobody")

    gone = [threading.Event() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(flights.run, "k", lambda e=e: not e.is_set(), fetch) for e in gone]
        going.wait()
        for n in (0, 1):  # the one whose run it is goes first
            gone[n].set()
            with pytest.raises(FetchCancelled):
                calls[n].result(5)
        assert not ended.wait(0.1)
        gone[2].set()
        with pytest.raises(FetchCancelled):
            calls[2].result(5)
        assert ended.wait(5)
    assert len(runs) == 1


def test_who_comes_as_a_run_is_given_up_starts_another() -> None:
    flights: SingleFlight[int] = SingleFlight()
    runs: list[int] = []
    joined = threading.Event()

    def fetch(wanted, deliver) -> None:
        runs.append(1)
        if len(runs) == 1:
            joined.wait(5)
            raise FetchCancelled("nobody")
        deliver(7)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(flights.run, "k", lambda: not joined.is_set(), fetch)
        second = threads.submit(flights.run, "k", always, fetch)
        time.sleep(0.1)
        joined.set()
        assert second.result(5) == 7
        with pytest.raises(FetchCancelled):
            first.result(5)
    assert len(runs) == 2


def test_without_threads_a_run_fails_and_parts_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    flights: SingleFlight[int] = SingleFlight()
    queue, done = PartQueue(3), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="new thread"):
            flights.run("key", lambda: True, lambda wanted, deliver: deliver(1))
        queue.run([lambda n=n: done.append(n) for n in range(5)])
    assert sorted(done) == list(range(5))
    assert flights.run("key", lambda: True, lambda wanted, deliver: deliver(2)) == 2
    assert queue._idle == 3
