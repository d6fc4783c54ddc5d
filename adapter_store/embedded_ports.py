"""The ports of the embedded object store: five in a row on loopback, and the same for gRPC."""

from __future__ import annotations

import secrets
import socket

import psutil

from .errors import EmbeddedStoreError

HOST = "127.0.0.1"
SERVICES = ("s3", "master", "volume", "filer", "admin")  # in the order of their ports
GRPC_OFFSET = 10_000  # SeaweedFS listens for gRPC on each HTTP port plus this

# Picked from: above Ray's worker ports, and with the offset still below Linux's ephemeral ports.
_FIRST, _LAST = 20_000, 22_000
_PICKS = 50


def check(port: int, setting: str) -> None:
    """Raises EmbeddedStoreError unless a server can have `port` and those that follow from it.

    Args:
        setting: how a user chooses the port, for the message.
    """
    highest = 65_535 - GRPC_OFFSET - len(SERVICES) + 1
    if not 1024 <= port <= highest:
        raise EmbeddedStoreError(
            f"port {port} can't be the embedded object store's: it must be from 1024 to "
            f"{highest}; choose with {setting}"
        )
    busy = _first_busy(port)
    if busy is not None:
        raise EmbeddedStoreError(
            f"port {busy} on {HOST} is in use{_user_of(busy)}. The embedded object store needs "
            f"{port} to {port + len(SERVICES) - 1} and the same plus {GRPC_OFFSET}; choose others "
            f"with {setting}"
        )


def are_free(port: int) -> bool:
    """Whether a server can have `port` and those that follow from it."""
    return _first_busy(port) is None


def pick(last: int, setting: str) -> int:
    """A port that can be had: `last` if it was picked before and still can, else any."""
    if _FIRST <= last <= _LAST and are_free(last):
        return last
    for _ in range(_PICKS):
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        if are_free(port):
            return port
    raise EmbeddedStoreError(
        f"found no {len(SERVICES)} free ports in a row between {_FIRST} and {_LAST}; choose with "
        f"{setting}"
    )


def _first_busy(port: int) -> int | None:
    """The first of the ports that a server on `port` needs and that can't be had."""
    for i in range(len(SERVICES)):
        for needed in (port + i, port + i + GRPC_OFFSET):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, needed))
                except OSError:
                    return needed
    return None


def _user_of(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status == "LISTEN" and address and address.port == port:
                if connection.pid:
                    name = psutil.Process(connection.pid).name()
                    return f" by process {connection.pid} ({name})"
                break
    except (psutil.Error, OSError):
        pass  # other users' processes can't be seen; the number is what matters
    return ""
