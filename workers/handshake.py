"""The handshake of the wire protocol: both sides prove that they hold a secret."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

from .errors import WireAuthError, WireError
from .wire import Frame, field

PROTOCOL_VERSION = 1
_NONCE_BYTES = 32


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
