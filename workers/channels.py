"""Frames over a connection: `FrameProtocol` for event loops, `BlockingChannel` for threads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import Any, cast

from .errors import WireAuthError, WireError
from .handshake import ClientHandshake
from .wire import HANDSHAKE_TIMEOUT_S, MAX_FRAME_BYTES, Frame, FrameDecoder, encode

_RECEIVE_BYTES = 256 << 10


class FrameProtocol(asyncio.Protocol):
    """One connection's frames on an event loop. Subclasses give the four hooks at the end.

    A WireError out of `frame_received` ends the connection: the peer is told why in an "error"
    frame. No other input can reach the rest of the process.
    """

    def __init__(self, limit: int = MAX_FRAME_BYTES):
        self.decoder = FrameDecoder(limit)
        self.transport: asyncio.Transport | None = None
        self.heard = 0.0  # loop time of the last bytes, for `DEAD_AFTER_S`
        self.paused = False  # the peer doesn't read: send nothing that can wait
        self._why: str | None = None

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send(self, frame: Mapping[str, Any]) -> None:
        """Queues a frame; on a closed connection it is dropped (`lost` tells of the loss)."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(encode(frame))

    def send_bytes(self, data: bytes) -> None:
        """Queues frames that are encoded already."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self, why: str) -> None:
        """Ends the connection at once; `lost` is called with `why` soon after."""
        self._why = self._why or why
        if self.transport is not None:
            self.transport.abort()

    def refuse(self, error: WireError) -> None:
        """Tells the peer what it did wrong, then closes."""
        code = "auth" if isinstance(error, WireAuthError) else "protocol"
        self.send({"t": "error", "code": code, "error": str(error)})
        self._why = self._why or str(error)
        if self.transport is not None:
            self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.heard = asyncio.get_running_loop().time()
        self.made()

    def data_received(self, data: bytes) -> None:
        self.heard = asyncio.get_running_loop().time()
        try:
            for frame in self.decoder.feed(data):
                self.frame_received(frame)
                if not self.open:
                    return
        except WireError as e:
            self.refuse(e)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost(self._why or (str(exc) if exc else "the peer closed the connection"))

    def made(self) -> None:
        """The connection stands."""

    def frame_received(self, frame: Frame) -> None:
        """A frame has arrived."""

    def writable(self) -> None:
        """The peer reads again after `paused`."""

    def lost(self, why: str) -> None:
        """The connection is gone; called once."""


class BlockingChannel:
    """Frames over a connected socket, for threads. One thread receives, any may send."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._decoder = FrameDecoder()
        self._arrived: list[Frame] = []
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, host: str, port: int, secret: bytes) -> tuple[BlockingChannel, Frame]:
        """Connects and authenticates; returns the channel and the server's `ready` frame.

        Raises:
            WireError: nothing answers there in time, or the handshake fails.
        """
        try:
            sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
        except OSError as e:
            raise WireError(f"can't connect to {host}:{port}: {e}") from e
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = cls(sock)
            handshake = ClientHandshake(secret)
            channel.send(handshake.auth(channel._must_receive()))
            ready = handshake.check(channel._must_receive())
            sock.settimeout(None)
        except OSError as e:
            sock.close()
            raise WireError(f"no handshake with {host}:{port}: {e}") from e
        except WireError:
            sock.close()
            raise
        return channel, ready

    def send(self, frame: Mapping[str, Any]) -> None:
        """Blocks until the kernel has taken the frame. Raises OSError when the peer is gone."""
        self.send_bytes(encode(frame))

    def send_bytes(self, data: bytes) -> None:
        """`send` for frames that are encoded already."""
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> Frame | None:
        """The next frame; None at the end of the stream.

        Raises:
            WireError: the peer broke the protocol.
        """
        while not self._arrived:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except ConnectionError:
                return None
            if not data:
                return None
            self._arrived = list(self._decoder.feed(data))
        return self._arrived.pop(0)

    def close(self) -> None:
        """Ends the connection; a blocked `receive` returns None."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _must_receive(self) -> Frame:
        frame = self.receive()
        if frame is None:
            raise WireError("the peer closed the connection during the handshake")
        return frame
