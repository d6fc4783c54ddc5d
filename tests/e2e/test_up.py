"""`loraplex up` as a user starts it: ready, on loopback only, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from loraplex.cluster.ports import free_port

from tests.e2e.runs import DEMO, READY_S, ROOT, Up

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*args: str, port: int | None = None, **env: str) -> Up:
        started.append(Up(tmp_path / "data", port or free_port(), *args, **env))
        return started[-1]

    yield start
    for run in started:
        run.kill_everything()


def ask(facts: dict, tenant: dict, model: str) -> httpx.Response:
    return httpx.post(
        f"{facts['url']}/v1/completions",
        headers={"authorization": f"Bearer {tenant['key']}"},
        json={"model": model, "prompt": "In the beginning", "max_tokens": 8, "temperature": 0},
        timeout=60,
        trust_env=False,
    )


def test_a_day_in_the_life_of_the_demo(up: Callable[..., Up]) -> None:
    run = up()
    facts = run.wait_ready()
    assert stat.S_IMODE((run.data / "demo.json").stat().st_mode) == 0o600
    assert set(facts) == {"url", "admin_key", "tenants"}
    assert facts["url"] == f"http://127.0.0.1:{run.port}"
    assert sum(len(t["adapters"]) for t in facts["tenants"]) == 4
    assert len(facts["tenants"]) == 3

    answers = {}
    for tenant in facts["tenants"]:
        for model in tenant["adapters"]:
            response = ask(facts, tenant, model)
            assert response.status_code == 200, response.text
            answers[model] = response.json()["choices"][0]["text"]
    shown = run.output()
    assert f"curl {facts['url']}/v1/chat/completions" in shown
    assert f'OpenAI(base_url="{facts["url"]}/v1"' in shown
    assert all(tenant["key"] in shown for tenant in facts["tenants"])

    # Nothing of it can be reached from outside.
    listeners = [
        (process.pid, process.name(), connection.laddr.ip, connection.laddr.port)
        for process in run.tree()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]
    assert run.port in {port for *_, port in listeners}
    outside = [x for x in listeners if x[2] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert outside == []

    # No process of Ray stands in the repository, where `kernels` is a top-level package, or in a
    # folder where another user could put a module.
    for process in run.tree():
        folder = Path(process.cwd())
        assert not folder.is_relative_to(ROOT), process.cmdline()
        assert folder == Path("/") or stat.S_IMODE(folder.stat().st_mode) == 0o700

    # A second one on the same folder is told about the first, and disturbs nothing.
    second = subprocess.run(
        [
            *(sys.executable, "-m", "loraplex.cluster.cli", "up", "--port", str(free_port())),
            *("--data-dir", str(run.data), "--demo-dir", str(DEMO)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert str(run.process.pid) in second.stderr
    assert ask(facts, facts["tenants"][0], facts["tenants"][0]["adapters"][0]).status_code == 200

    # Ctrl-C goes to the whole process group, as from a terminal.
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_gone()
    assert run.process.wait(5) == 0
    assert not (run.data / "demo.json").exists()

    # What was uploaded is there again; the keys are others.
    again = up(port=run.port)
    new = again.wait_ready()
    for tenant, old in zip(new["tenants"], facts["tenants"], strict=True):
        assert tenant["adapters"] == old["adapters"]
        assert tenant["key"] != old["key"]
        assert ask(new, old, tenant["adapters"][0]).status_code == 401
        for model in tenant["adapters"]:
            response = ask(new, tenant, model)
            assert response.json()["choices"][0]["text"] == answers[model]
            listed = httpx.get(
                f"{new['url']}/v1/adapters/{model}",
                headers={"authorization": f"Bearer {tenant['key']}"},
                trust_env=False,
            ).json()
            assert listed["current_version"] == 1, "an upload of the same adapter is no new version"
    assert new["admin_key"] == facts["admin_key"]

    # kill -9 leaves nobody behind either.
    again.process.kill()
    again.wait_gone()
    assert not (run.data / "demo.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("progress", ["object store", "Ray "])
def test_a_signal_during_the_start_ends_everything(
    up: Callable[..., Up], number: signal.Signals, progress: str
) -> None:
    run = up()
    run.wait_until(lambda: f"✓ {progress}" in run.output(), progress, READY_S)
    run.tree()
    run.process.send_signal(number)
    run.wait_gone()
    assert run.process.wait(5) == 0
    assert "Traceback" not in run.output()


def test_a_crash_in_the_start_leaves_no_process_and_says_why(
    up: Callable[..., Up], tmp_path: Path
) -> None:
    # The groups can't load this: a model whose weights lack a tensor.
    demo = tmp_path / "demo"
    demo.mkdir()
    for entry in DEMO.iterdir():
        if entry.name != "model":
            (demo / entry.name).symlink_to(entry)
    model = demo / "model"
    model.mkdir()
    for entry in (DEMO / "model").iterdir():
        if entry.suffix != ".safetensors":
            (model / entry.name).symlink_to(entry)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(4)
    (model / "model.safetensors").write_bytes(raw)
    run = up("--demo-dir", str(demo))
    deadline = time.monotonic() + READY_S
    while run.process.poll() is None:
        run.tree()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.1)
    run.wait_gone()
    assert run.process.returncode == 1
    shown = run.output()
    assert "error:" in shown
    assert "Traceback" not in shown
    assert not (run.data / "demo.json").exists()


def test_a_busy_port_is_named_before_anything_starts(up: Callable[..., Up]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run = up(port=port)
        assert run.process.wait(60) == 1
    shown = run.output()
    assert str(port) in shown
    assert "--port" in shown
    assert "LORAPLEX_PORT" in shown
    assert "Traceback" not in shown
    assert not (run.data / "store").exists()
