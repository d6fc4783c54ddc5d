"""Requests that somebody traces, while the engine works on them. No OpenTelemetry here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RequestTrace:
    """What a group did for one request.

    `spans` follow each other from `started_ns` on (Unix time): name -> seconds.
    """

    traceparent: str
    started_ns: int
    attributes: Mapping[str, str]
    spans: Mapping[str, float]
    error_code: str | None = None


class TracedRequests:
    """Remembers traced requests from their arrival to their end, and hands their traces on."""

    def __init__(self, group: str, emit: Callable[[RequestTrace], None] | None):
        self._group, self._emit = group, emit
        self._open: dict[str, tuple[Mapping[str, Any], int]] = {}  # by engine id

    def begin(self, engine_id: str, request: Mapping[str, Any]) -> None:
        """`request`: `GenerationRequest.to_wire`."""
        if self._emit is not None and request.get("traceparent"):
            self._open[engine_id] = request, time.time_ns()

    def see(self, outputs: Iterable[Mapping[str, Any]]) -> None:
        """One engine step's outputs, by engine id."""
        if not self._open:
            return
        for output in outputs:
            if "finish_reason" in output or "error_code" in output:
                self._end(output["id"], output.get("spans", {}), output.get("error_code"))

    def drop(self, engine_ids: Iterable[str], code: str) -> None:
        """Requests that ended without an output."""
        for engine_id in engine_ids:
            self._end(engine_id, {}, code)

    def drop_all(self, code: str) -> None:
        self.drop(list(self._open), code)

    def _end(self, engine_id: str, spans: Mapping[str, float], code: str | None) -> None:
        request, started_ns = self._open.pop(engine_id, ({}, 0))
        if not request or self._emit is None:
            return
        attributes = {
            "loraplex.group": self._group,
            "loraplex.request": str(request["id"]),
            "loraplex.tenant": str(request["tenant"]),
            "loraplex.digest": str(request["adapter"] or "base"),
        }
        self._emit(RequestTrace(request["traceparent"], started_ns, attributes, spans, code))
