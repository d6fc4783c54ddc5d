"""`loraplex up` as a user starts it: ready, on loopback only, and gone without a trace."""

from __future__ import annotations

import contextlib
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

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(os.environ.get("LORAPLEX_DEMO_DIR") or ROOT / "deploy/demo")
READY_S = 180.0  # one busy core; the product's own goal is measured by the benchmarks
STOP_S = 30.0

pytestmark = [pytest.mark.timeout(600), pytest.mark.cluster]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Up:
    """One `loraplex up` in a process group of its own, as a shell would run it."""

    def __init__(self, data: Path, port: int, *args: str, **env: str):
        self.data = data
        self.port = port
        self.log = data.parent / f"up-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "loraplex.cluster.cli", "up"]
        command += ["--port", str(port), "--data-dir", str(data), "--demo-dir", str(DEMO), *args]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=data.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **env},
            )
        self.seen: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The process and all below it; what was ever seen is remembered."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self.seen.setdefault(process.pid, process)
        return [p for p in self.seen.values() if alive(p)]

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.tree()
            assert self.process.poll() is None, f"up ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} in time:\n{self.output()}"
            time.sleep(0.1)

    def wait_ready(self) -> dict:
        demo = self.data / "demo.json"
        self.wait_until(demo.exists, "demo.json", READY_S)
        self.tree()
        return json.loads(demo.read_text())

    def wait_gone(self, timeout_s: float = STOP_S) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.tree():
            # The parent's exit must be collected, or it stays as a zombie.
            self.process.poll()
            assert time.monotonic() < deadline, f"still there: {left}\n{self.output()}"
            time.sleep(0.1)

    def kill_everything(self) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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

    # No process of Ray stands in the repository, where `kernels` is a top-level package.
    for process in run.tree():
        if process.pid != run.process.pid:
            assert not Path(process.cwd()).is_relative_to(ROOT), process.cmdline()

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
