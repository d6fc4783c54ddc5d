"""Frames of the wire protocol between gateways, group fronts and ranks.

A frame is a big-endian u32 length and that many bytes of msgpack, which hold one map with a
string under "t", its type. docs/wire-protocol.md lists the types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgpack

from .errors import WireError
from .request import ErrorCode

MAX_FRAME_BYTES = 64 << 20  # prompt logprobs of a long prompt are the largest frames
MAX_HANDSHAKE_BYTES = 4096  # what a peer may send before it has proved that it knows the secret
HANDSHAKE_TIMEOUT_S = 5.0
PING_EVERY_S = 2.0
DEAD_AFTER_S = 6.0

_HEADER_BYTES = 4

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


def encode_batch(
    outputs: Sequence[Mapping[str, Any]], **fields: Any
) -> tuple[list[bytes], list[str]]:
    """Frames of type "batch" that carry `outputs` (`TokenOutput.to_wire`): one, if it fits.

    An output that is too large for any frame is replaced by an error for its request, so that
    one request can't end a connection that others share.

    Returns:
        The frames, and the ids of requests that were ended so: what works on them is to stop.
    """
    try:
        return [encode({"t": "batch", "out": outputs, **fields})], []
    except WireError as e:
        if len(outputs) > 1:
            half = len(outputs) // 2
            first, ended = encode_batch(outputs[:half], **fields)
            second, also_ended = encode_batch(outputs[half:], **fields)
            return first + second, ended + also_ended
        request_id = outputs[0]["id"]
        text = f"the answer is too large: {e}; ask for fewer logprobs"
        error = error_output(request_id, "response_too_large", text)
        return [encode({"t": "batch", "out": [error], **fields})], [request_id]


def error_output(request_id: str, code: ErrorCode, error: str) -> Frame:
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
