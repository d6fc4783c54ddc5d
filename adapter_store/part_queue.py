"""Threads that work on the parts of all downloads in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from .errors import FetchCancelled

Job = Callable[[], None]

# Helpers of all downloads together; each download has a thread of its own beside them.
HELPERS = 8


class PartQueue:
    """A budget of helping threads. Thread-safe.

    Who has a batch of parts works on it himself, and helpers take parts of all batches in turn:
    a small download waits for no large one. Helpers end when nothing is left to do.
    """

    def __init__(self, helpers: int = HELPERS) -> None:
        self._lock = threading.Lock()
        self._batches: deque[_Batch] = deque()
        self._idle = helpers

    def run(self, jobs: Iterable[Job], wanted: Callable[[], bool] = lambda: True) -> None:
        """Runs all jobs; returns when none runs any more.

        The first one that fails keeps the rest from starting, and its error is raised.

        Raises:
            FetchCancelled: `wanted` said no before all had started.
        """
        batch = _Batch(jobs, wanted)
        with self._lock:
            self._batches.append(batch)
            helpers = min(self._idle, len(batch.left) - 1)
            self._idle -= max(helpers, 0)
        for _ in range(helpers):
            try:
                threading.Thread(target=self._help, name="pack-part", daemon=True).start()
            except RuntimeError:  # the system has no more: it goes without
                with self._lock:
                    self._idle += 1
        while (job := batch.take()) is not None:
            batch.work(job)
        with self._lock:
            self._batches.remove(batch)
        batch.finish()

    def _help(self) -> None:
        while True:
            with self._lock:
                for _ in range(len(self._batches)):
                    batch = self._batches[0]
                    self._batches.rotate(-1)
                    job = batch.take()
                    if job is not None:
                        break
                else:
                    self._idle += 1
                    return
            batch.work(job)


class _Batch:
    """The parts of one download."""

    def __init__(self, jobs: Iterable[Job], wanted: Callable[[], bool]) -> None:
        self.left = deque(jobs)
        self._wanted = wanted
        self._running = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take(self) -> Job | None:
        """The next part, counted as running until `work` is done with it."""
        with self._changed:
            if self.left and self._error is None and not self._wanted():
                self._error = FetchCancelled("nobody waits for the pack any more")
            if not self.left or self._error is not None:
                return None
            self._running += 1
            return self.left.popleft()

    def work(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            if self._error is not None:
                raise self._error
