"""A gateway's connection to one worker group: many requests at once over one socket."""

from __future__ import annotations

import asyncio
import random
from collections import deque

from ..workers import (
    DEAD_AFTER_S,
    HANDSHAKE_TIMEOUT_S,
    PING_EVERY_S,
    ClientHandshake,
    Frame,
    FrameProtocol,
    GenerationRequest,
    TokenOutput,
    WireError,
)
from .errors import ClusterError
from .routing import Floods, GroupLoad

# Tokens of one stream that may be on their way or wait here for its consumer.
WINDOW_TOKENS = 128
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 2.0


class GroupLost(ClusterError):
    """The connection to a group broke, or there is none now."""


class GroupStream:
    """The outputs of one request. One consumer; `close` at the end, whatever happened."""

    def __init__(self, link: _Link, request_id: str, window: int):
        self._link = link
        self._request_id = request_id
        self._window = window
        self._arrived: deque[Frame] = deque()
        self._taken = 0  # tokens taken since credit was granted last
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._lost: str | None = None

    async def next(self) -> TokenOutput:
        """The next output. After the one that ends the request there is none to wait for.

        Raises:
            GroupLost: the connection broke, and all that had come before was returned.
        """
        while not self._arrived:
            if self._lost is not None:
                raise GroupLost(self._lost)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output = self._arrived.popleft()
        self._taken += len(output["tok"])
        if 2 * self._taken >= self._window and not self._ended:
            self._link.send({"t": "credit", "id": self._request_id, "n": self._taken})
            self._taken = 0
        return TokenOutput.from_wire(output)

    def close(self) -> None:
        """Gives the stream up; the group stops working on it unless it has ended."""
        if self._link.streams.pop(self._request_id, None) is not None:
            self._link.send({"t": "abort", "id": self._request_id})
        self._arrived.clear()

    def push(self, output: Frame) -> None:
        self._arrived.append(output)
        if "finish_reason" in output or "error_code" in output:
            self._ended = True
            del self._link.streams[self._request_id]
        self._notify()

    def lose(self, why: str) -> None:
        self._lost = why
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Link(FrameProtocol):
    """One life of the connection; `up` and `down` resolve when it stands and when it is gone."""

    def __init__(self, group: str, secret: bytes):
        super().__init__()
        loop = asyncio.get_running_loop()
        self.streams: dict[str, GroupStream] = {}
        self.up: asyncio.Future[None] = loop.create_future()
        self.down: asyncio.Future[str] = loop.create_future()
        self.draining = False
        self.load = GroupLoad(0.0)  # as far as is known here
        self.resident: frozenset[str] = frozenset()
        self.floods: Floods = {}
        self._group = group
        self._handshake: ClientHandshake | None = ClientHandshake(secret)

    def frame_received(self, frame: Frame) -> None:
        if self._handshake is not None:
            self._shake_hands(self._handshake, frame)
            return
        kind = frame["t"]
        if kind == "batch":
            self._note_load(frame["load"])
            for output in frame["out"]:
                stream = self.streams.get(output["id"])
                if stream is not None:
                    stream.push(output)
        elif kind == "report":
            self._note_report(frame)
        elif kind == "ping":
            self.floods = frame["floods"]
            self._note_load(frame["load"])
        elif kind == "draining":
            self.draining = True
        elif kind == "error":
            self.close(f"the group ended the connection: {frame.get('error')}")
        else:
            raise WireError(f"a group may not send a frame of type {kind!r}")

    def lost(self, why: str) -> None:
        if not self.up.done():
            self.up.set_exception(GroupLost(why))
        self.down.set_result(why)
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.lose(why)

    def _shake_hands(self, handshake: ClientHandshake, frame: Frame) -> None:
        if frame["t"] == "hello":
            self.send(handshake.auth(frame))
            return
        try:
            ready = handshake.check(frame)
            if ready["group"] != self._group:
                # Ports are used again: another group may have come up at a dead one's address.
                raise WireError(f"group {ready['group']!r} answers there, not {self._group!r}")
        except WireError as e:
            self.close(str(e))
            return
        self._handshake = None
        self._note_report(ready["report"])
        if not self.up.done():
            self.up.set_result(None)

    def _note_load(self, load: Frame) -> None:
        self.load = GroupLoad(
            float(load["queued"] + load["running"]),
            load["wait_s"],
            load["turn_s"],
            load["token_s"],
            self.resident,
            self.floods,
        )

    def _note_report(self, report: Frame) -> None:
        self.resident, self.floods = frozenset(report["gpu"]), report["floods"]
        self._note_load(report["load"])


class GroupConnection:
    """The connection to one group, made again with backoff when it breaks, until `close`."""

    def __init__(
        self, group: str, host: str, port: int, secret: bytes, window: int = WINDOW_TOKENS
    ):
        self.group = group
        self.address = (host, port)
        self._failure = "not connected yet"
        self._secret = secret
        self._window = window
        self._link: _Link | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ends the connection; open streams raise GroupLost."""
        if self._task is not None:
            self._task.cancel()
            # Not `await task` with its cancellation suppressed: that would swallow the caller's.
            await asyncio.wait([self._task])

    @property
    def connected(self) -> bool:
        return self._live is not None

    @property
    def failure(self) -> str | None:
        """Why there is no connection now; None while there is one."""
        if self._link is not None and self._link.down.done():
            return self._link.down.result()
        return self._failure if self._link is None else None

    @property
    def draining(self) -> bool:
        """The group takes no new requests."""
        return self._link is not None and self._link.draining

    @property
    def load(self) -> GroupLoad:
        """What the group has to do, for all gateways; nothing while there is no connection."""
        return GroupLoad(0.0) if self._link is None else self._link.load

    @property
    def resident(self) -> frozenset[str]:
        """Keys of the adapters in the group's pool."""
        return frozenset() if self._link is None else self._link.resident

    @property
    def streams(self) -> int:
        """Open streams of this gateway."""
        return 0 if self._link is None else len(self._link.streams)

    @property
    def _live(self) -> _Link | None:
        # A link that is down is still `_link` until its task has run.
        return None if self._link is None or self._link.down.done() else self._link

    def open(self, request: GenerationRequest) -> GroupStream:
        """Submits a request.

        Raises:
            GroupLost: there is no connection now.
            ValueError: a request of this id is open already.
        """
        link = self._live
        if link is None:
            raise GroupLost(f"no connection to group {self.group}: {self.failure}")
        if request.request_id in link.streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        stream = GroupStream(link, request.request_id, self._window)
        link.streams[request.request_id] = stream
        tokens = len(request.prompt_ids) + len(request.output_ids)
        # Until the group's next figures, which count it.
        link.load = link.load.after(request.tenant_id, tokens)
        link.send({"t": "submit", "req": request.to_wire(), "credit": self._window})
        return stream

    async def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        loop = asyncio.get_running_loop()
        while True:
            link = _Link(self.group, self._secret)
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    await loop.create_connection(lambda link=link: link, *self.address)
                    await link.up
                self._link = link
                retry_s = _FIRST_RETRY_S
                await self._watch(link)
            except TimeoutError:
                self._failure = f"no handshake within {HANDSHAKE_TIMEOUT_S:g} s"
            except (OSError, GroupLost) as e:
                self._failure = str(e)
            finally:
                self._link = None
                link.close("the gateway closed the connection")
            # Spread out, so that many gateways don't knock at once when a group comes back.
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _watch(self, link: _Link) -> None:
        """Pings until the connection is gone, then raises GroupLost with the reason."""
        loop = asyncio.get_running_loop()
        while not link.down.done():
            await asyncio.wait([link.down], timeout=PING_EVERY_S)
            if loop.time() - link.heard > DEAD_AFTER_S:
                link.close(f"nothing heard for {DEAD_AFTER_S:g} s")
            link.send({"t": "ping"})
        raise GroupLost(link.down.result())
