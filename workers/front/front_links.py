"""The two kinds of connections of a group's front: gateways' and ranks'."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Any, Protocol

from ..channels import FrameProtocol
from ..errors import WireError
from ..handshake import ServerHandshake
from ..report import EngineReport
from ..wire import (
    HANDSHAKE_TIMEOUT_S,
    MAX_FRAME_BYTES,
    MAX_HANDSHAKE_BYTES,
    Frame,
    encode_batch,
    field,
)
from .streams import Client, Output

_MAX_CREDIT = 1 << 31
# Bytes that may wait in a gateway's socket buffer before its streams are held back.
_SEND_BUFFER_BYTES = 1 << 20


class GatewayEvents(Protocol):
    """What the front does about what gateways send."""

    def greeting(self) -> Frame:
        """Fields for the `ready` frame."""
        ...

    def joined(self, link: GatewayLink) -> None: ...
    def submit(self, link: GatewayLink, request: Mapping[str, Any], credit: int) -> None: ...
    def abort(self, link: GatewayLink, request_id: str) -> None: ...
    def grant(self, link: GatewayLink, request_id: str, tokens: int) -> None: ...
    def writable(self, link: GatewayLink) -> None: ...
    def left(self, link: GatewayLink) -> None: ...


class RankEvents(Protocol):
    """What the front does about what ranks send."""

    def rank_joined(self, rank: int, link: RankLink) -> None: ...
    def rank_up(self, rank: int) -> None: ...
    def rank_failed(self, rank: int, error: str) -> None: ...
    def rank_left(self, rank: int, why: str) -> None: ...
    def take_batch(self, outputs: list[Output]) -> None: ...
    def take_report(self, report: EngineReport) -> None: ...


class _ServerLink(FrameProtocol):
    """A connection that must authenticate within HANDSHAKE_TIMEOUT_S before it may do anything."""

    def __init__(self, secret: bytes):
        super().__init__(MAX_HANDSHAKE_BYTES)
        self.authenticated = False
        self._handshake = ServerHandshake(secret)
        self._timeout: asyncio.TimerHandle | None = None

    def made(self) -> None:
        text = f"no authentication within {HANDSHAKE_TIMEOUT_S:g} s"
        loop = asyncio.get_running_loop()
        self._timeout = loop.call_later(HANDSHAKE_TIMEOUT_S, self.refuse, WireError(text))
        self.send(self._handshake.hello())

    def frame_received(self, frame: Frame) -> None:
        if self.authenticated:
            self.message(frame)
            return
        ready = self._handshake.ready(frame, **self.greeting())
        self.authenticated = True
        self.decoder.limit = MAX_FRAME_BYTES
        self._end_timeout()
        self.send(ready)
        self.welcomed()

    def lost(self, why: str) -> None:
        self._end_timeout()
        if self.authenticated:
            self.gone(why)

    def _end_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()

    def greeting(self) -> Frame:
        """Fields for the `ready` frame."""
        return {}

    def welcomed(self) -> None:
        """The peer has authenticated."""

    def message(self, frame: Frame) -> None:
        """A frame of the authenticated peer."""

    def gone(self, why: str) -> None:
        """The authenticated peer has left."""


class GatewayLink(_ServerLink):
    """A gateway's connection: many requests at once, each a stream of its `client`."""

    def __init__(self, front: GatewayEvents, secret: bytes):
        super().__init__(secret)
        self.front = front
        self.client = Client()

    def made(self) -> None:
        super().made()
        if self.transport is not None:
            self.transport.set_write_buffer_limits(_SEND_BUFFER_BYTES)

    def send_batch(self, outputs: list[Output], load: Frame) -> list[str]:
        """Sends outputs; the ids of requests that ended because theirs was too large."""
        frames, ended = encode_batch(outputs, load=load)
        for data in frames:
            self.send_bytes(data)
        return ended

    def finish(self) -> None:
        """Closes once the peer has been sent what is queued for it."""
        if self.transport is not None:
            self.transport.close()

    def greeting(self) -> Frame:
        return self.front.greeting()

    def welcomed(self) -> None:
        self.front.joined(self)

    def message(self, frame: Frame) -> None:
        kind = frame["t"]
        if kind == "credit":
            self.front.grant(self, field(frame, "id", str), _credit(frame, "n"))
        elif kind == "submit":
            request = field(frame, "req", dict)
            field(request, "id", str)
            self.front.submit(self, request, _credit(frame, "credit"))
        elif kind == "abort":
            self.front.abort(self, field(frame, "id", str))
        elif kind != "ping":
            raise WireError(f"a gateway may not send a frame of type {kind!r}")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.client.paused = True

    def writable(self) -> None:
        self.front.writable(self)

    def gone(self, why: str) -> None:
        self.front.left(self)


def _credit(frame: Frame, name: str) -> int:
    n = field(frame, name, int)
    if not 0 < n <= _MAX_CREDIT:
        raise WireError(f"frame {frame['t']!r}: {name!r} must be between 1 and 2^31, got {n}")
    return n


class RankLink(_ServerLink):
    """The connection of one rank's process. Its end is the end of the group."""

    def __init__(self, front: RankEvents, secret: bytes):
        super().__init__(secret)
        self.front = front
        self.pid = 0  # 0: it hasn't said yet
        self.progressed = 0.0  # loop time of the last sign that its engine's loop turns
        self._rank: int | None = None

    def kill(self) -> None:
        """Ends the rank's process, whatever it does. While the link stands, the id is its own."""
        if self.open and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def message(self, frame: Frame) -> None:
        kind = frame["t"]
        if self._rank is None:
            if kind != "rank":
                raise WireError(f"the first frame of a rank must be 'rank', got {kind!r}")
            self._rank = field(frame, "rank", int)
            self.pid = field(frame, "pid", int)
            if self.pid <= 1:
                raise WireError(f"a rank's process id must be above 1, got {self.pid}")
            self.front.rank_joined(self._rank, self)
        elif kind == "beat":
            return
        elif kind == "batch":
            self.progressed = self.heard
            self.front.take_batch(field(frame, "out", list))
        elif kind == "report":
            self.progressed = self.heard
            self.front.take_report(EngineReport.from_wire(field(frame, "report", dict)))
        elif kind == "up":
            self.progressed = self.heard
            self.front.rank_up(self._rank)
        elif kind == "failed":
            self.front.rank_failed(self._rank, field(frame, "error", str))
        else:
            raise WireError(f"a rank may not send a frame of type {kind!r}")

    def gone(self, why: str) -> None:
        if self._rank is not None:
            self.front.rank_left(self._rank, why)
