"""`loraplex doctor`: each check sees its fault, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from loraplex.adapter_store import ObjectStore
from loraplex.cluster.doctor import Check, examine
from loraplex.cluster.doctor.gpus import judge
from loraplex.cluster.doctor.machine import memlock, open_files, port, shm
from loraplex.cluster.doctor.store import try_store
from loraplex.cluster.ports import free_port
from loraplex.cluster.settings import Settings

MODEL = Path(__file__).resolve().parents[2] / "deploy/demo/model"


def now() -> datetime:
    return datetime.now(UTC)


def verdicts(checks: Any) -> dict[str, str]:
    checks = list(checks)
    assert all(bool(c.advice) == (c.verdict in ("warn", "fail")) for c in checks), checks
    return {c.name: c.verdict for c in checks}


def test_a_sound_store_passes_and_is_left_as_it_was(store: ObjectStore) -> None:
    store.put("kept", b"1")
    names = ("store", "clock", "conditional writes", "ranges", "presigned uploads")
    assert verdicts(try_store(store, now)) == dict.fromkeys(names, "ok")
    assert [item.key for item in store.list("")] == ["kept"]


class Odd:
    """A store with one fault."""

    def __init__(self, store: ObjectStore, **methods: Any) -> None:
        self._store = store
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_each_fault_of_a_store_is_seen(store: ObjectStore) -> None:
    def unconditional(key: str, data: bytes, **conditions: Any) -> str:
        return store.put(key, data)

    def half_conditional(key: str, data: bytes, if_match: str | None = None, **rest: Any) -> str:
        return store.put(key, data, **rest)

    def whole(key: str, etag: str, start: int, length: int, fd: int) -> None:
        os.pwrite(fd, store.get(key)[0][:length], start)

    def unsigned(key: str, *args: Any) -> str:
        return f"{store.endpoint}/{store.bucket}/{key}"

    for name, fault in {
        "conditional writes": {"put": unconditional},
        "ranges": {"read_range": whole},
        "presigned uploads": {"presign_put": unsigned},
    }.items():
        seen = verdicts(try_store(Odd(store, **fault), now))
        assert [n for n, verdict in seen.items() if verdict == "fail"] == [name]
    seen = verdicts(try_store(Odd(store, get=lambda key: (b"other", "")), now))
    assert seen["store"] == "fail"
    seen = verdicts(try_store(Odd(store, put=half_conditional), now))
    assert seen["conditional writes"] == "fail"
    for off, verdict in ((60, "warn"), (-60, "warn"), (400, "fail"), (-400, "fail")):
        late = timedelta(seconds=off)
        assert verdicts(try_store(store, lambda late=late: now() + late))["clock"] == verdict
    assert not list(store.list("meta/"))


def test_a_store_that_cant_be_reached_is_named_without_its_keys() -> None:
    store = ObjectStore(
        "s3://there", endpoint=f"http://127.0.0.1:{free_port()}", access_key="a", secret_key="hush"
    )
    (check,) = try_store(store, now)
    assert check.verdict == "fail"
    assert str(store.endpoint) in check.detail
    assert "hush" not in check.detail + check.advice


def test_limits_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(nbytes: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": nbytes}))

    size(64 << 20)  # Docker's default
    assert shm(tmp_path, Settings()).verdict == "fail"
    assert "--shm-size" in shm(tmp_path, Settings()).advice
    size(128 << 20)
    assert shm(tmp_path, Settings()).verdict == "ok"
    assert shm(tmp_path, Settings(tp=4, groups=2)).verdict == "fail"
    assert shm(tmp_path / "none", Settings()).verdict == "fail"

    assert memlock(resource.RLIM_INFINITY, Settings()).verdict == "ok"
    assert memlock(1 << 16, Settings(device="cpu")).verdict == "ok"
    monkeypatch.setattr("loraplex.cluster.up_checks.gpu_count", lambda: 2)
    assert memlock(1 << 16, Settings()).verdict == "warn"
    assert [open_files(n).verdict for n in (1024, 8192, 65536)] == ["fail", "warn", "ok"]


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken.settimeout(0.1)
        number = taken.getsockname()[1]
        check = port("127.0.0.1", number, "port")
        assert (check.verdict, str(number) in check.advice) == ("fail", True)
    assert port("127.0.0.1", free_port(), "port").verdict == "ok"
    assert port("127.0.0.1", 0, "port").verdict == "ok"


def found(**changes: Any) -> dict[str, Any]:
    gpu = {"name": "H100", "bytes": 80 << 30, "capability": [9, 0]}
    whole = {"torch": "2.11", "cuda": "12.8", "gpus": [gpu, gpu], "nccl": "2.27"}
    return {**whole, "all_reduce": True, **changes}


def test_what_torch_finds_of_gpus_is_judged() -> None:
    one, two = Settings(device="cuda"), Settings(device="cuda", tp=2)
    assert verdicts(judge(found(), "", one)) == {"torch on the GPU": "ok", "nccl": "skip"}
    assert verdicts(judge(found(), "", two)) == {"torch on the GPU": "ok", "nccl": "ok"}
    assert verdicts(judge(found(all_reduce=False), "", two))["nccl"] == "fail"
    old = found(gpus=[{"name": "V100", "bytes": 16 << 30, "capability": [7, 0]}])
    assert verdicts(judge(old, "", one))["compute capability"] == "fail"
    assert verdicts(judge(found(gpus=[]), "", one)) == {"torch on the GPU": "fail"}
    assert verdicts(judge(None, "no driver", one)) == {"torch on the GPU": "fail"}


def test_models_and_settings_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(**values: Any) -> Check:
        settings = Settings.load(device="cpu", port=0, data_dir=tmp_path, **values)
        (check,) = [c for c in examine(settings) if c.name == "model"]
        return check

    assert model().verdict == "skip"
    assert model(model_path=MODEL).verdict == "ok"
    (tmp_path / "config.json").write_text("{}")
    broken = model(model_path=tmp_path)
    assert (broken.verdict, "tokenizer.json" in broken.advice) == ("fail", True)
    monkeypatch.setenv("LORAPLEX_PROT", "1")
    first = next(iter(examine(Settings())))
    assert (first.name, first.verdict) == ("settings", "warn")


def test_the_command_prints_json_and_its_exit_code_tells(
    store: ObjectStore, s3_server: Any, tmp_path: Path
) -> None:
    def run(endpoint: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "store_endpoint": endpoint,
            "store_access_key": s3_server.access_key,
            "store_secret_key": s3_server.secret_key,
            "port": 0,
            "device": "cpu",
        }
        command = [sys.executable, "-X", "importtime", "-m", "loraplex.cluster.cli", "doctor"]
        command += ["--json", "--store", store.url, "--data-dir", str(tmp_path)]
        command += [f"--set={name}={value}" for name, value in settings.items()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    sound = run(s3_server.endpoint)
    checks = {c["name"]: c for c in json.loads(sound.stdout)}
    assert checks["conditional writes"]["verdict"] == "ok"
    failed = [c for c in checks.values() if c["verdict"] == "fail"]
    assert sound.returncode == bool(failed)  # this machine's limits may be too low
    assert not any(line.endswith((" torch", " ray")) for line in sound.stderr.splitlines())
    cut_off = run("http://127.0.0.1:1")
    assert cut_off.returncode == 1
    assert {c["name"]: c["verdict"] for c in json.loads(cut_off.stdout)}["store"] == "fail"
