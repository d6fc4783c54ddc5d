"""The service on one machine: its data folder, its watchdog, and what is checked before a start."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loraplex.cluster.local_dir import DataDir, DataDirError, make_run_dir
from loraplex.cluster.local_ray import RayStartError, ray_environment, start_serve
from loraplex.cluster.local_watchdog import end_processes, processes_in
from loraplex.cluster.settings import Settings
from loraplex.cluster.up_checks import (
    CheckError,
    check_memory,
    check_model_folder,
    check_port,
    choose_device,
    gpu_count,
)
from ray.exceptions import RayTaskError


def wait_for(condition, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def sleepers():
    """Starts processes in a folder; kills them at the end."""
    started: list[subprocess.Popen] = []

    def start(folder: Path, code: str = "") -> subprocess.Popen:
        line = f"import time\n{code}\nprint('up', flush=True)\ntime.sleep(60)"
        process = subprocess.Popen(
            [sys.executable, "-c", line], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


class TestDataDir:
    def test_second_user_is_told_who_has_it(self, tmp_path: Path) -> None:
        first, second = DataDir(tmp_path / "data"), DataDir(tmp_path / "data")
        first.open()
        with pytest.raises(DataDirError, match=rf"process {os.getpid()}.*--data-dir"):
            second.open()
        first.close()
        second.open()
        second.close()

    def test_lock_of_a_killed_process_is_free(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path\n"
            "from loraplex.cluster.local_dir import DataDir\n"
            f"DataDir(Path({str(tmp_path)!r})).open(); print('up', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"up\n"
            other.kill()
            other.wait()
        data = DataDir(tmp_path)
        data.open()
        data.close()

    def test_facts_with_keys_are_private_and_replaced_whole(self, tmp_path: Path) -> None:
        data = DataDir(tmp_path)
        data.open()
        for number in range(3):
            data.write_demo({"url": f"http://127.0.0.1:{number}", "tenants": []})
            assert json.loads(data.demo_json.read_text())["url"].endswith(str(number))
            assert stat.S_IMODE(data.demo_json.stat().st_mode) == 0o600
        assert [p.name for p in tmp_path.glob(".demo*")] == []
        data.close()

    def test_facts_of_a_dead_run_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / "demo.json").write_text("{}")
        data = DataDir(tmp_path)
        data.open()
        assert not data.demo_json.exists()
        data.close()

    def test_unwritable_folder_is_named(self) -> None:
        with pytest.raises(DataDirError, match=r"/proc/nowhere.*LORAPLEX_DATA_DIR"):
            DataDir(Path("/proc/nowhere")).open()

    def test_run_dir_leaves_room_for_socket_names(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 80)))
        folder = make_run_dir()
        try:
            assert len(str(folder)) <= 40
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        finally:
            folder.rmdir()


class TestWatchdog:
    def test_finds_processes_by_folder_whatever_they_call_themselves(
        self, tmp_path: Path, sleepers
    ) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "other").mkdir()
        inside = [sleepers(tmp_path), sleepers(tmp_path / "deep")]
        outside = sleepers(tmp_path.parent)
        found = processes_in(tmp_path)
        assert {p.pid for p in inside} <= set(found)
        assert outside.pid not in found

    def test_kills_what_ignores_sigterm(self, tmp_path: Path, sleepers) -> None:
        stubborn = sleepers(
            tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        )
        assert stubborn.pid in end_processes(tmp_path)
        assert stubborn.wait(5) == -signal.SIGKILL

    def test_spares_its_parent(self, tmp_path: Path, sleepers) -> None:
        spared = sleepers(tmp_path)
        assert end_processes(tmp_path, spare=[spared.pid]) == []
        assert spared.poll() is None

    @pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
    def test_cleans_up_after_a_parent_that_died(self, tmp_path: Path, ending: int) -> None:
        code = f"""
import os, subprocess, sys, time
from pathlib import Path
from loraplex.cluster.local_dir import DataDir, make_run_dir, ray_dir
from loraplex.cluster.local_watchdog import Watchdog
data = DataDir(Path({str(tmp_path)!r})); data.open()
run = make_run_dir(); os.chdir(run)
dog = Watchdog(run, ray_dir(run), data.ray_logs, data.demo_json, data.lock_fd)
data.write_demo({{}})
(ray_dir(run) / "session_latest" / "logs").mkdir(parents=True)
(ray_dir(run) / "session_latest" / "logs" / "raylet.out").write_text("hello")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=True, env={{}})
print(run, child.pid, dog.pid, flush=True)
time.sleep(60)
"""
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            run, child, dog = parent.stdout.readline().split()
            assert processes_in(run) == sorted([parent.pid, int(child)])
            with pytest.raises(DataDirError):
                DataDir(tmp_path).open()
            parent.send_signal(ending)
            parent.wait()
        assert wait_for(lambda: not os.path.exists(f"/proc/{dog}"))
        assert not os.path.exists(f"/proc/{child}")
        assert not Path(run).exists()
        assert not (tmp_path / "demo.json").exists()
        assert (tmp_path / "logs" / "ray" / "raylet.out").read_text() == "hello"
        data = DataDir(tmp_path)
        data.open()  # the watchdog held the lock; it is free now
        data.close()


class TestChecks:
    def test_busy_port_is_named_with_its_user_and_the_way_out(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with pytest.raises(CheckError) as caught:
                check_port("127.0.0.1", port)
        assert all(
            text in str(caught.value)
            for text in (str(port), str(os.getpid()), "--port", "LORAPLEX_PORT")
        )
        check_port("127.0.0.1", port)

    def test_port_that_is_taken_after_the_check_is_one_plain_error(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        cause = RuntimeError("Failed to bind to address '127.0.0.1:22111'.")

        def start(**options: object) -> None:
            raise RayTaskError("ProxyActor.ready", "Traceback: ...", cause).as_instanceof_cause()

        monkeypatch.setattr("ray.serve.start", start)
        with pytest.raises(CheckError) as caught:
            start_serve(Settings(port=22111), tmp_path)
        assert str(caught.value) == (
            "port 22111 on 127.0.0.1 is in use. Choose another with --port or LORAPLEX_PORT"
        )

    def test_other_failures_of_serve_are_one_line_with_the_logs_folder(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def start(**options: object) -> None:
            cause = RuntimeError("no such thing")
            raise RayTaskError("ProxyActor.ready", "Traceback: ...", cause).as_instanceof_cause()

        monkeypatch.setattr("ray.serve.start", start)
        with pytest.raises(RayStartError) as caught:
            start_serve(Settings(port=22111), tmp_path)
        assert str(caught.value) == (
            f"Ray Serve did not start: no such thing. Its logs are in {tmp_path}"
        )

    def test_foreign_address_is_named(self) -> None:
        with pytest.raises(CheckError, match=r"192\.0\.2\.77.*--host"):
            check_port("192.0.2.77", 18000)

    @pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "*.safetensors"])
    def test_incomplete_model_folder(self, tmp_path: Path, missing: str) -> None:
        for name in {"config.json", "tokenizer.json", "model.safetensors"}:
            if name != missing and not (missing.startswith("*") and name.endswith("tensors")):
                (tmp_path / name).write_bytes(random.randbytes(64))
        with pytest.raises(CheckError) as caught:
            check_model_folder(tmp_path)
        assert missing in str(caught.value)
        assert "--model" in str(caught.value)

    def test_absent_model_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckError, match="does not exist"):
            check_model_folder(tmp_path / "none")

    def test_pointers_in_place_of_weights(self, tmp_path: Path) -> None:
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_text("{}")
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(CheckError, match="git lfs pull"):
            check_model_folder(tmp_path)

    def test_too_little_memory(self, monkeypatch) -> None:
        monkeypatch.setattr("loraplex.cluster.up_checks.available_memory", lambda: 10**9)
        with pytest.raises(CheckError, match=r"1\.0 GB are free.*--groups"):
            check_memory(Settings(groups=2), 10**8)

    def test_gpus_hidden_by_the_environment_are_not_counted(self, monkeypatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert gpu_count() == 0
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
        assert gpu_count() == 2

    def test_device_follows_gpus_and_torch(self, monkeypatch) -> None:
        checks = "loraplex.cluster.up_checks"
        monkeypatch.setattr(f"{checks}.gpu_count", lambda: 0)
        assert choose_device(Settings()).device == "cpu"
        monkeypatch.setattr(f"{checks}.gpu_count", lambda: 1)
        monkeypatch.setattr(f"{checks}.torch_has_cuda", lambda: True)
        chosen = choose_device(Settings(groups=2))
        assert (chosen.device, chosen.groups) == ("cuda", 1)
        with pytest.raises(CheckError, match="need 2 GPUs, there are 1"):
            choose_device(Settings(device="cuda", groups=2))
        monkeypatch.setattr(f"{checks}.torch_has_cuda", lambda: False)
        assert choose_device(Settings()).device == "cpu"
        with pytest.raises(CheckError, match="without CUDA"):
            choose_device(Settings(device="cuda", groups=1))


class TestRayEnvironment:
    def test_ray_stays_on_loopback_and_out_of_the_repository(self, tmp_path: Path) -> None:
        env = ray_environment(Settings(), tmp_path / "token")
        assert env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert env["PYTHONSAFEPATH"] == "1"
        assert env["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in env

    def test_haproxy_and_other_addresses_are_opt_in(self, tmp_path: Path) -> None:
        env = ray_environment(Settings(haproxy=True, internal_host="192.0.2.7"), tmp_path)
        assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in env
