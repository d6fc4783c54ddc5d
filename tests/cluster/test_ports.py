"""Ports for listeners that others open later: free, and not among those that clients get."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

import pytest
from loraplex.cluster import ports
from loraplex.cluster.ports import free_port


def test_it_can_be_bound_and_is_no_ephemeral_port() -> None:
    low, high = ports._ephemeral_range()
    for _ in range(20):
        port = free_port()
        assert not low <= port <= high
        socket.create_server(("127.0.0.1", port)).close()


def test_ports_that_somebody_has_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        taken, free = server.getsockname()[1], free_port()
        picks = iter([0, 0, 1])
        monkeypatch.setattr(ports, "_candidates", lambda low, high: [taken, free])
        monkeypatch.setattr(secrets, "randbelow", lambda count: next(picks))
        assert free_port() == free


def test_two_callers_rarely_get_the_same() -> None:
    assert len({free_port() for _ in range(20)}) > 15


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32768\t60999\n", range(22_100, 30_000)),
        ("25000 60999", range(22_100, 25_000)),
        ("15000 60999", range(61_000, 65_536)),
        ("1024 65535", range(22_100, 30_000)),  # there are no others
        ("nonsense", range(22_100, 30_000)),
    ],
)
def test_ports_are_taken_from_outside_of_the_ephemeral_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: range
) -> None:
    (tmp_path / "range").write_text(text)
    monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
    assert ports._candidates(*ports._ephemeral_range()) == expected


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError):
        free_port("192.0.2.77")
