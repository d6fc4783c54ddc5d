"""Calls for one thing at a time share one run, which ends early when nobody waits any more."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

from .errors import FetchCancelled

logger = logging.getLogger(__name__)

T = TypeVar("T")
Wanted = Callable[[], bool]
Deliver = Callable[[T], None]

_POLL_S = 0.05


def always() -> bool:
    return True


class _Flight(Generic[T]):
    def __init__(self) -> None:
        self.future: Future[T] = Future()
        self.waiting: list[Wanted] = []

    def wanted(self) -> bool:
        return any(wanted() for wanted in list(self.waiting))


class SingleFlight(Generic[T]):
    """Thread-safe. A run has a thread of its own: none of its callers need stay for the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight[T]] = {}

    def run(self, key: str, wanted: Wanted, fetch: Callable[[Wanted, Deliver[T]], None]) -> T:
        """What `fetch` delivers, in this call's run or in one that is under way.

        Args:
            wanted: asked now and then; a no ends this call.
            fetch: called with `wanted` of all who wait, and with what to call with the result. It
                may go on after that; a later call starts another run.

        Raises:
            FetchCancelled: this call isn't wanted any more. Or whatever `fetch` raised.
        """
        while True:
            with self._lock:
                flight = self._flights.get(key)
                mine = flight is None
                if flight is None:
                    flight = self._flights[key] = _Flight()
                flight.waiting.append(wanted)
            if mine:
                thread = threading.Thread(target=self._fly, args=(key, flight, fetch), daemon=True)
                try:
                    thread.start()
                except (
                    RuntimeError
                ) as error:  # the system has no more: nobody may wait for this one
                    self._land(key, flight)
                    flight.future.set_exception(error)
            while True:
                try:
                    return flight.future.result(_POLL_S)
                except TimeoutError:
                    if flight.future.done():
                        raise  # it is what `fetch` raised
                    if not wanted():
                        raise FetchCancelled(f"nobody waits for {key} any more") from None
                except FetchCancelled:
                    if not wanted():
                        raise
                    break  # it was given up just before this call came

    def running(self) -> list[str]:
        with self._lock:
            return list(self._flights)

    def _fly(
        self, key: str, flight: _Flight[T], fetch: Callable[[Wanted, Deliver[T]], None]
    ) -> None:
        def deliver(result: T) -> None:
            self._land(key, flight)
            with contextlib.suppress(InvalidStateError):  # too late: the run was given up
                flight.future.set_result(result)

        try:
            fetch(flight.wanted, deliver)
        except BaseException as error:
            if flight.future.done():
                if not isinstance(error, FetchCancelled):  # those who waited have theirs
                    logger.warning("%s is here, but then: %s", key, error)
                return
            self._land(key, flight)
            flight.future.set_exception(error)

    def _land(self, key: str, flight: _Flight[T]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
