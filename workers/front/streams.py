"""The open streams of a group's front: whose they are, and what may be sent to them now.

Pure bookkeeping, no I/O. A stream may be sent `credit` more tokens; what the engine makes beyond
that is held here until its client grants more, while other streams go on. Held tokens are
bounded over all streams: past the bound, the tenant that holds most loses its largest stream.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from ..errors import WireError
from ..request import ErrorCode
from ..wire import error_output

Output = dict[str, Any]  # `TokenOutput.to_wire`


class Client:
    """One gateway connection's streams, by request id."""

    __slots__ = ("paused", "streams")

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.paused = False  # its socket takes no more at the moment


class Stream:
    """One request of one client. The engine knows it by `engine_id`, unique in the group."""

    __slots__ = ("client", "credit", "engine_id", "held", "held_tokens", "request_id", "tenant")

    def __init__(self, client: Client, request_id: str, engine_id: str, credit: int, tenant: str):
        self.client = client
        self.request_id = request_id
        self.tenant = tenant
        self.engine_id = engine_id
        self.credit = credit
        self.held: deque[Output] = deque()
        self.held_tokens = 0


def _weight(output: Output) -> int:
    """About how many tokens' worth of memory an output takes; alternatives count as tokens."""
    weight = max(1, len(output["tok"]))
    for name in ("lp", "plp"):
        if output.get(name):
            weight += sum(1 + len(x[3]) for x in output[name] if x is not None)
    return weight


def _is_final(output: Output) -> bool:
    return "finish_reason" in output or "error_code" in output


class StreamTable:
    """All streams of a front.

    Args:
        max_held_tokens: bound on tokens that wait for credit, over all streams.
    """

    def __init__(self, max_held_tokens: int):
        self._max_held = max_held_tokens
        self._running: dict[str, Stream] = {}  # by engine id; those that the engine works on
        self._running_of: Counter[str] = Counter()  # the same, counted by tenant
        self._holding: set[Stream] = set()
        self._serial = itertools.count()
        self.held_tokens = 0

    @property
    def idle(self) -> bool:
        """Nothing is in work and nothing waits for a client."""
        return not self._running and not self._holding

    @property
    def running(self) -> int:
        """Streams that the engine still works on."""
        return len(self._running)

    def running_of(self, tenant: str) -> int:
        """The tenant's part of `running`."""
        return self._running_of[tenant]

    def add(self, client: Client, request_id: str, credit: int, tenant: str) -> Stream:
        """Opens a stream.

        Raises:
            WireError: the client has a stream of this name already.
        """
        if request_id in client.streams:
            raise WireError(f"request id {request_id!r} is in use on this connection")
        # Two gateways may use one id; the engine must never mix their streams up.
        engine_id = f"{request_id}#{next(self._serial)}"
        stream = Stream(client, request_id, engine_id, credit, tenant)
        client.streams[request_id] = self._running[stream.engine_id] = stream
        self._running_of[tenant] += 1
        return stream

    def abort(self, client: Client, request_id: str) -> str | None:
        """Forgets a stream; its engine id if the engine works on it."""
        stream = client.streams.pop(request_id, None)
        return None if stream is None else self._forget(stream)

    def remove(self, client: Client) -> list[str]:
        """Forgets all streams of a client; the engine ids of those that the engine works on."""
        streams = list(client.streams.values())
        client.streams.clear()
        return [i for s in streams if (i := self._forget(s)) is not None]

    def route(self, outputs: Iterable[Output]) -> dict[Client, list[Output]]:
        """Takes one engine step's outputs; what may be sent to each client now, in order."""
        ready: dict[Client, list[Output]] = {}
        running = self._running
        for output in outputs:
            stream = running.get(output["id"])
            if stream is None:
                continue  # aborted since
            output["id"] = stream.request_id
            final = _is_final(output)
            if final:
                self._ended(stream)
            tokens = len(output["tok"])
            client = stream.client
            if stream.held or client.paused or (tokens and stream.credit <= 0):
                stream.held.append(output)
                self._holding.add(stream)
                weight = _weight(output)
                stream.held_tokens += weight
                self.held_tokens += weight
                continue
            stream.credit -= tokens
            if final:
                del client.streams[stream.request_id]
            ready.setdefault(client, []).append(output)
        return ready

    def grant(self, client: Client, request_id: str, tokens: int) -> list[Output]:
        """Adds credit to a stream; what may be sent to it now."""
        stream = client.streams.get(request_id)
        if stream is None:
            return []  # it ended while the credit was on its way
        stream.credit += tokens
        return self._flush(stream)

    def resume(self, client: Client) -> list[Output]:
        """The client's socket takes data again; what may be sent to it now."""
        client.paused = False
        return [o for s in list(client.streams.values()) for o in self._flush(s)]

    def trim(self) -> tuple[dict[Client, list[Output]], list[str]]:
        """Ends streams until the bound on held tokens is kept: the largest of the tenant whose
        streams hold most together, so that many slow ones of one tenant end nobody else's.

        Returns:
            Errors to send to each client, and engine ids to abort.
        """
        errors: dict[Client, list[Output]] = {}
        aborts: list[str] = []
        while self.held_tokens > self._max_held:
            holds: Counter[str] = Counter()
            for held in self._holding:
                holds[held.tenant] += held.held_tokens
            stream = max(self._holding, key=lambda s: (holds[s.tenant], s.held_tokens))
            del stream.client.streams[stream.request_id]
            text = (
                f"the client left {stream.held_tokens} tokens waiting and the group's room for "
                f"such tokens ({self._max_held}) is full; read the stream faster"
            )
            error = error_output(stream.request_id, "client_too_slow", text)
            errors.setdefault(stream.client, []).append(error)
            if (engine_id := self._forget(stream)) is not None:
                aborts.append(engine_id)
        return errors, aborts

    def fail_all(self, code: ErrorCode, text: str) -> dict[Client, list[Output]]:
        """Ends every stream that the engine works on; the errors to send to each client.

        What they hold is dropped: a continuation starts from what the client has. Streams that
        are complete stay until their clients have taken them.
        """
        errors: dict[Client, list[Output]] = {}
        for stream in list(self._running.values()):
            del stream.client.streams[stream.request_id]
            self._forget(stream)
            error = error_output(stream.request_id, code, text)
            errors.setdefault(stream.client, []).append(error)
        return errors

    def _forget(self, stream: Stream) -> str | None:
        self.held_tokens -= stream.held_tokens
        stream.held.clear()
        stream.held_tokens = 0
        self._holding.discard(stream)
        return stream.engine_id if self._ended(stream) else None

    def _ended(self, stream: Stream) -> bool:
        """The engine doesn't work on it any more; whether it did."""
        if self._running.pop(stream.engine_id, None) is None:
            return False
        self._running_of[stream.tenant] -= 1
        if not self._running_of[stream.tenant]:
            del self._running_of[stream.tenant]
        return True

    def _flush(self, stream: Stream) -> list[Output]:
        sent: list[Output] = []
        held = stream.held
        while held and not stream.client.paused and (stream.credit > 0 or not held[0]["tok"]):
            output = held.popleft()
            weight = _weight(output)
            stream.held_tokens -= weight
            self.held_tokens -= weight
            stream.credit -= len(output["tok"])
            if _is_final(output):
                del stream.client.streams[stream.request_id]
            sent.append(output)
        if not held:
            self._holding.discard(stream)
        return sent
