"""Requests whose grammar is compiled before they are queued, beside the engine's steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

from ..request import ErrorCode, GenerationRequest
from .grammar import Grammars

COMPILE_S = 10.0  # that a request's grammar may take, waiting for others' included
_SLOW = f"the grammar takes more than {COMPILE_S:.0f} s to compile; make it simpler"
_BUSY = f"the group has been compiling others' grammars for {COMPILE_S:.0f} s; try again later"


@dataclass(frozen=True)
class _Waiting:
    request: GenerationRequest
    compiling: Future[object]
    submitted: float


class CompileQueue:
    """Holds requests back until their grammars are there. Seconds are passed in, of one clock."""

    def __init__(self, grammars: Grammars):
        self._grammars = grammars
        self._waiting: dict[str, _Waiting] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def hold(self, request: GenerationRequest, now: float) -> bool:
        """Keeps the request if it has a grammar that must be compiled first."""
        grammar = request.sampling.grammar
        compiling = None if grammar is None else self._grammars.compiling(grammar)
        if compiling is None:
            return False
        self._waiting[request.request_id] = _Waiting(request, compiling, now)
        return True

    def drop(self, request_id: str) -> None:
        """Forgets a request; one that isn't here is no error."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.compiling.cancel()

    def take(
        self, now: float
    ) -> Iterator[tuple[GenerationRequest, float, tuple[ErrorCode, str] | None]]:
        """Takes out who needn't wait any more: request, when it was submitted, and why it ends
        if its grammar wasn't compiled in time."""
        for request_id, w in list(self._waiting.items()):
            if w.compiling.done():
                error = None
            elif now <= w.submitted + COMPILE_S:
                continue
            elif w.compiling.cancel():  # no thread had come to it: that isn't its own fault
                error = "overloaded", _BUSY
            else:
                error = "invalid_grammar", _SLOW
            del self._waiting[request_id]
            yield w.request, w.submitted, error

    def rest(self, seconds: float) -> None:
        """Waits until one of the grammars is there, for at most so long."""
        wait([w.compiling for w in self._waiting.values()], seconds, "FIRST_COMPLETED")
