"""Ports for listeners that are opened later, by somebody else: Ray Serve, a test's service."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

# Above Ray's workers (10002 to 19999) and the embedded object store's first five ports (20000 to
# 22004), and below its other five (30000 to 32004).
_FIRST, _END = 22_100, 30_000
_ENOUGH = 100
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LINUX_EPHEMERAL = (32_768, 60_999)
_PICKS = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody has, and that the kernel hands out to nobody by itself.

    A port that `bind(0)` chose could be any client's a moment later; this one is outside of the
    range that such sockets get, and chosen at random, so that two callers rarely get the same.

    Raises:
        OSError: `host` isn't an address of this machine, or no port of it is free.
    """
    reason: OSError | None = None
    candidates = _candidates(*_ephemeral_range())
    for _ in range(_PICKS):
        port = candidates[secrets.randbelow(len(candidates))]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                reason = error
    assert reason is not None
    raise reason


def _candidates(low: int, high: int) -> range:
    """Ports to choose from, given the first and the last ephemeral one."""
    below, above = range(_FIRST, min(_END, low)), range(high + 1, 65_536)
    for ports in (below, above):
        if len(ports) >= _ENOUGH:
            return ports
    return range(_FIRST, _END)  # every port is ephemeral here; the check has to do


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = _EPHEMERAL.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return _LINUX_EPHEMERAL
