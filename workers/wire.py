"""The wire protocol between gateways, group fronts and ranks: frames and the handshake.

A frame is a big-endian u32 length and that many bytes of msgpack, which hold one map with a
string under "t", its type. docs/wire-protocol.md lists the types. Nothing here does I/O of its
own: `FrameProtocol` hangs on an asyncio transport, `BlockingChannel` on a connected socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgpack

from .errors import WireAuthError, WireError

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 << 20  # prompt logprobs of a long prompt are the largest frames
MAX_HANDSHAKE_BYTES = 4096  # what a peer may send before it has proved that it knows the secret
HANDSHAKE_TIMEOUT_S = 5.0
PING_EVERY_S = 2.0
DEAD_AFTER_S = 6.0

_HEADER_BYTES = 4
_RECEIVE_BYTES = 256 << 10
_NONCE_BYTES = 32

Frame = dict[str, Any]
T = TypeVar("T")


def encode(frame: Mapping[str, Any]) -> bytes:
    """One frame's bytes.

    Raises:
        WireError: it is longer than MAX_FRAME_BYTES, or holds what msgpack can't carry.
    """
    try:
        body = cast(bytes, msgpack.packb(frame))
    except (TypeError, ValueError, OverflowError) as e:
        raise WireError(f"frame {frame.get('t')!r} can't be written as msgpack: {e}") from e
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(
            f"frame {frame.get('t')!r} has {len(body)} bytes; the limit is {MAX_FRAME_BYTES}"
        )
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def encode_batch(outputs: Sequence[Mapping[str, Any]], **fields: Any) -> list[bytes]:
    """Frames of type "batch" that carry `outputs` (`TokenOutput.to_wire`): one, if it fits.

    An output that is too large for any frame is replaced by an error for its request, so that
    one request can't end a connection that others share.
    """
    try:
        return [encode({"t": "batch", "out": outputs, **fields})]
    except WireError as e:
        if len(outputs) > 1:
            half = len(outputs) // 2
            return encode_batch(outputs[:half], **fields) + encode_batch(outputs[half:], **fields)
        error = error_output(outputs[0]["id"], "response_too_large", str(e))
        return [encode({"t": "batch", "out": [error], **fields})]


def error_output(request_id: str, code: str, error: str) -> Frame:
    """The wire form of the `TokenOutput` that ends a request with an error."""
    return {
        "id": request_id,
        "tok": [],
        "finish_reason": "error",
        "error_code": code,
        "error": error,
    }


def _decode(body: bytes | memoryview) -> Frame:
    try:
        frame = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as e:
        # msgpack's own errors are ValueErrors; so are bad UTF-8 and lying lengths.
        raise WireError(f"a frame of {len(body)} bytes isn't valid msgpack: {e}") from None
    if not isinstance(frame, dict) or not isinstance(frame.get("t"), str):
        raise WireError(
            f"a frame of {len(body)} bytes isn't a map with its type under 't' "
            f"(got {type(frame).__name__})"
        )
    return frame


class FrameDecoder:
    """Cuts a byte stream into frames. Holds at most one frame and one read.

    `limit` may be raised between frames, as it is when the handshake has passed.
    """

    def __init__(self, limit: int = MAX_FRAME_BYTES):
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every frame that is complete with `data`.

        Raises:
            WireError: a frame is longer than `limit` or isn't a msgpack map with a type.
        """
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= _HEADER_BYTES:
                start = position + _HEADER_BYTES
                length = int.from_bytes(self._buffer[position:start], "big")
                if length > self.limit:
                    raise WireError(
                        f"a frame of {length} bytes is announced; the limit is {self.limit} "
                        "(is the peer speaking another protocol?)"
                    )
                if len(self._buffer) < start + length:
                    return
                position = start + length
                yield _decode(bytes(memoryview(self._buffer)[start:position]))
        finally:
            del self._buffer[:position]


def field(frame: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """`frame[name]`, which must be a `kind`.

    Raises:
        WireError: it is missing or of another type.
    """
    value = frame.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise WireError(
            f"frame {frame.get('t')!r}: field {name!r} must be of type {kind.__name__}, "
            f"got {type(value).__name__}"
        )
    return value


def _mac(secret: bytes, side: bytes, nonce: bytes) -> bytes:
    # The side's name keeps one side's answer from being played back as the other's.
    return hmac.new(secret, side + nonce, hashlib.sha256).digest()


class ServerHandshake:
    """The accepting side: hello -> auth -> ready. Both sides prove that they hold `secret`."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self._nonce = secrets.token_bytes(_NONCE_BYTES)

    def hello(self) -> Frame:
        return {"t": "hello", "version": PROTOCOL_VERSION, "nonce": self._nonce}

    def ready(self, auth: Frame, **fields: Any) -> Frame:
        """Checks the client's answer; the frame to send back, with `fields` in it.

        Raises:
            WireAuthError: the client doesn't hold the secret.
            WireError: the frame isn't an `auth`.
        """
        if auth["t"] != "auth":
            raise WireError(f"the first frame must be 'auth', got {auth['t']!r}")
        mac, nonce2 = field(auth, "mac", bytes), field(auth, "nonce2", bytes)
        if not hmac.compare_digest(mac, _mac(self._secret, b"client", self._nonce)):
            raise WireAuthError("authentication failed: the peer holds another secret")
        return {"t": "ready", "mac": _mac(self._secret, b"server", nonce2), **fields}


class ClientHandshake:
    """The connecting side of `ServerHandshake`."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self._nonce2 = secrets.token_bytes(_NONCE_BYTES)

    def auth(self, hello: Frame) -> Frame:
        """The answer to `hello`.

        Raises:
            WireError: the server speaks another version, or it isn't a hello.
        """
        _no_error(hello)
        if hello["t"] != "hello":
            raise WireError(f"expected 'hello', got {hello['t']!r}")
        if hello.get("version") != PROTOCOL_VERSION:
            raise WireError(
                f"the peer speaks protocol version {hello.get('version')!r}, this side "
                f"{PROTOCOL_VERSION}; run the same Loraplex on both"
            )
        mac = _mac(self._secret, b"client", field(hello, "nonce", bytes))
        return {"t": "auth", "mac": mac, "nonce2": self._nonce2}

    def check(self, ready: Frame) -> Frame:
        """Returns `ready` when the server has proved that it holds the secret.

        Raises:
            WireAuthError: either side holds another secret.
            WireError: it isn't a ready.
        """
        _no_error(ready)
        if ready["t"] != "ready":
            raise WireError(f"expected 'ready', got {ready['t']!r}")
        mac = field(ready, "mac", bytes)
        if not hmac.compare_digest(mac, _mac(self._secret, b"server", self._nonce2)):
            raise WireAuthError("authentication failed: the server holds another secret")
        return ready


def _no_error(frame: Frame) -> None:
    if frame["t"] == "error":
        kind = WireAuthError if frame.get("code") == "auth" else WireError
        raise kind(f"the peer refused the connection: {frame.get('error')}")


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
