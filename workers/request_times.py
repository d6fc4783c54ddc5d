"""When things happened to one request in its engine, for traces and figures of queueing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

# adapter: its pack is on the way to this node. pool: there is no room for it among the resident
# ones. kv: too few free KV blocks. batch: the batch is full, or it is somebody else's turn.
Cause = Literal["adapter", "pool", "kv", "batch"]


@dataclass
class RequestTimes:
    """Seconds of this process's monotonic clock; 0 for what hasn't happened."""

    accepted_s: float = field(default_factory=time.monotonic)
    counted_s: float = 0.0  # up to here, waiting is booked
    waits_for: Cause | None = None  # as of the last look at the queue
    load_s: float = 0.0  # waited for the adapter, or for room for it
    admitted_s: float = 0.0  # the first time; a preempted request is admitted again
    in_batch: bool = False  # until it is seen in the queue again
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.counted_s = self.counted_s or self.accepted_s

    def spans(self, now: float) -> dict[str, float]:
        """Name -> seconds of what the request has gone through, in order, until `now`.

        Waiting for the adapter comes last in the queue: what goes before is the rest of it.
        """
        end = self.admitted_s or now
        waited = end - self.accepted_s
        spans = {"queue": waited - min(self.load_s, waited), "load": min(self.load_s, waited)}
        if self.admitted_s:
            spans["prefill"] = (self.first_token_s or now) - self.admitted_s
        if self.first_token_s:
            spans["decode"] = now - self.first_token_s
        return spans
