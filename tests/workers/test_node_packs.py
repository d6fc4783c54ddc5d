"""The packs of a node are listed beside the engine, and nothing on its way is missed."""

from __future__ import annotations

import threading
from concurrent.futures import wait

from loraplex.workers.pool.node_packs import NodePacks, PackLister


class SlowNode:
    """Lists when it is let."""

    def __init__(self) -> None:
        self.disk: dict[str, int] = {"t/a": 1}
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(1)

    def resident(self) -> dict[str, int]:
        found = dict(self.disk)
        self.begun.release()
        self.go.acquire()
        return found

    def host_resident(self) -> dict[str, int]:
        return {}


def test_a_listing_is_for_the_next_who_asks_and_never_waited_for():
    node = SlowNode()
    lister = PackLister(node)  # pyright: ignore[reportArgumentType]
    node.begun.acquire()
    first = lister.latest(["t/b"])
    assert first == NodePacks({"t/a": 1}, {}, ())
    node.begun.acquire()  # the second one has begun, and can't end
    node.disk["t/b"] = 2
    assert lister.latest([]) is first
    node.go.release()
    assert lister._coming is not None
    lister._coming.result()
    # It doesn't have what came while it ran, but says that it was on its way.
    assert lister.latest([]) == NodePacks({"t/a": 1}, {}, ("t/b",))
    node.go.release()
    lister._coming.result()
    assert lister.latest([]) == NodePacks({"t/a": 1, "t/b": 2}, {}, ())
    node.go.release()
    lister.close()


class Broken:
    """Can't list now and then."""

    def __init__(self) -> None:
        self.works = True

    def resident(self) -> dict[str, int]:
        if not self.works:
            raise OSError(24, "Too many open files")
        return {"t/a": 1}

    def host_resident(self) -> dict[str, int]:
        return {}


def test_a_listing_that_fails_leaves_the_one_before_and_the_next_may_work():
    node = Broken()
    lister = PackLister(node)  # pyright: ignore[reportArgumentType]

    def next_one() -> NodePacks:
        assert lister._coming is not None
        wait([lister._coming])
        return lister.latest(["t/b"])

    first = lister.latest([])
    node.works = False
    for _ in range(3):
        assert next_one() == first
    node.works = True
    next_one()  # the last one that failed
    assert next_one().loading == ("t/b",)
    lister.close()
