"""The command `loraplex` against a small HTTP server that answers as the gateway does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loraplex.cluster.cli_client import Client, RequestFailed, adapter_files

ADAPTER = {
    "object": "adapter",
    "name": "pirate",
    "current_version": 2,
    "version": 2,
    "digest": "ab" * 32,
    "created": "2026-11-23T11:00:00Z",
    "bytes": 2_500_000,
    "rank_max": 16,
    "format": "per-expert",
    "targets": ["q_proj"],
    "status": "ready",
}


class FakeService:
    """Records requests; answers what a test has set by (method, path), else 404."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {k.lower(): v for k, v in self.headers.items()}
                service.requests.append((self.command, self.path, headers, body))
                queue = service.answers.get((self.command, self.path))
                error = {"message": f"nothing at {self.path}", "code": "not_found"}
                status, data = (404, {"error": error}) if not queue else queue[0]
                if queue and len(queue) > 1:
                    queue.pop(0)
                raw = b"" if data is None else json.dumps(data).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def on(self, method: str, path: str, *answers: tuple[int, Any]) -> None:
        self.answers[method, path] = list(answers)


@pytest.fixture
def service():
    fake = FakeService()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "pirate"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    return folder


def loraplex(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loraplex.cluster.cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", **env},
    )


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    shown = loraplex("--help").stdout
    for command in ("up", "serve", "adapters", "tenants", "status"):
        assert command in shown
    code = (
        "import sys, loraplex.cluster.cli\n"
        "heavy = {'torch', 'ray', 'boto3', 'numpy', 'fastapi', 'httpx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_push_sends_both_files_under_the_folders_name(service: FakeService, adapter: Path) -> None:
    service.on("POST", "/v1/adapters", (201, ADAPTER))
    done = loraplex("adapters", "push", str(adapter), "--url", service.url, "--key", "lpx-1")
    assert done.returncode == 0, done.stderr
    assert "pirate@2" in done.stdout
    (request,) = service.requests
    assert request[2]["authorization"] == "Bearer lpx-1"
    assert b'name="name"\r\n\r\npirate\r\n' in request[3]
    assert b"weights" * 1000 in request[3]
    assert b'{"peft_type": "LORA"}' in request[3]


def test_key_and_address_come_from_the_environment_too(service: FakeService) -> None:
    service.on("GET", "/v1/adapters", (200, {"object": "list", "data": [ADAPTER]}))
    done = loraplex("adapters", "list", LORAPLEX_URL=service.url, LORAPLEX_KEY="lpx-2")
    assert done.returncode == 0, done.stderr
    assert "pirate" in done.stdout
    assert "2.5 MB" in done.stdout
    assert service.requests[0][2]["authorization"] == "Bearer lpx-2"


def test_rollback_and_delete(service: FakeService) -> None:
    service.on("POST", "/v1/adapters/pirate/rollback", (200, {**ADAPTER, "current_version": 1}))
    service.on("DELETE", "/v1/adapters/pirate", (204, None))
    at = ("--url", service.url, "--key", "k")
    assert "version 1" in loraplex("adapters", "rollback", "pirate", *at).stdout
    loraplex("adapters", "rollback", "pirate", "--to", "1", *at)
    assert "deleted" in loraplex("adapters", "delete", "pirate", *at).stdout
    assert [json.loads(r[3] or b"null") for r in service.requests] == [{}, {"version": 1}, None]


def test_tenant_is_made_with_its_first_key(service: FakeService) -> None:
    service.on("POST", "/admin/v1/tenants", (201, {"id": "t1", "name": "acme"}))
    service.on("POST", "/admin/v1/tenants/t1/keys", (201, {"id": "k1", "key": "lpx-new"}))
    done = loraplex(
        *("tenants", "create", "acme", "--tokens-per-minute", "500"),
        *("--url", service.url, "--key", "admin"),
    )
    assert done.returncode == 0, done.stderr
    assert "lpx-new" in done.stdout
    body = json.loads(service.requests[0][3])
    assert body == {"name": "acme", "limits": {"tokens_per_minute": 500}}


def test_a_tenants_weight_is_set_and_changed_by_name(service: FakeService) -> None:
    tenant = {
        "name": "acme",
        "id": "t1",
        "created": "2026-11-23T11:00:00Z",
        "limits": {
            "requests_per_minute": None,
            "tokens_per_minute": None,
            "max_adapters": None,
            "weight": 2.5,
        },
    }
    service.on("POST", "/admin/v1/tenants", (201, tenant))
    service.on("POST", "/admin/v1/tenants/t1/keys", (201, {"id": "k1", "key": "lpx-new"}))
    service.on("GET", "/admin/v1/tenants", (200, {"object": "list", "data": [tenant]}))
    service.on("PATCH", "/admin/v1/tenants/t1", (200, tenant))
    at = ("--url", service.url, "--key", "admin")
    assert loraplex("tenants", "create", "acme", "--weight", "2.5", *at).returncode == 0
    assert json.loads(service.requests[0][3])["limits"] == {"weight": 2.5}
    assert "2.5" in loraplex("tenants", "list", *at).stdout
    assert loraplex("tenants", "change", "acme", "--weight", "4", *at).returncode == 0
    assert json.loads(service.requests[-1][3]) == {"limits": {"weight": 4.0}}
    unknown = loraplex("tenants", "change", "globex", "--weight", "4", *at)
    assert unknown.returncode == 1
    assert "globex" in unknown.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("adapters", "list"), "LORAPLEX_KEY"),
        (("adapters", "list", "--key", "k", "--url", "http://127.0.0.1:9"), "loraplex up"),
        (("adapters", "push", "/nowhere/at/all", "--key", "k"), "/nowhere/at/all"),
        (("serve",), "--model"),
        (("serve", "--model", "/nowhere/model"), "/nowhere/model does not exist"),
        (("serve", "--model", "/tmp", "--store", "bucket"), "s3://bucket"),
        (("up", "--demo-dir", "/nowhere/demo"), "/nowhere/demo"),
        (("up", "--port", "70000"), "port"),
        (("up", "--tp", "0"), "tp"),
    ],
)
def test_errors_are_one_message_with_the_way_out(args: tuple[str, ...], said: str) -> None:
    done = loraplex(*args)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert done.stderr.startswith("error:")


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for args in (("--debug", "serve"), ("serve", "--debug")):
        done = loraplex(*args)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_refusal_is_shown_in_the_services_words(service: FakeService, adapter: Path) -> None:
    error = {"message": "DoRA adapters aren't served: use_dora is true", "code": "dora"}
    service.on("POST", "/v1/adapters", (422, {"error": error}))
    done = loraplex("adapters", "push", str(adapter), "--url", service.url, "--key", "k")
    assert done.returncode == 1
    assert "DoRA adapters aren't served" in done.stderr


def test_large_weights_go_to_the_store_and_the_result_is_awaited(
    service: FakeService, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.cluster.cli_client.DIRECT_BYTES", 100)
    monkeypatch.setattr("loraplex.cluster.cli_client._POLL_S", 0.01)
    urls = {part: f"{service.url}/bucket/{part}" for part in ("config", "weights")}
    path = "/v1/adapters/uploads"
    service.on("POST", path, (201, {"upload_id": "u1", "urls": urls, "headers": {"x-kept": "so"}}))
    service.on("PUT", "/bucket/config", (200, None))
    service.on("PUT", "/bucket/weights", (200, None))
    service.on("POST", f"{path}/u1/complete", (202, {}))
    ready = {"status": "ready", "adapter": ADAPTER}
    service.on("GET", f"{path}/u1", (200, {"status": "processing"}), (200, ready))
    sent = []
    with Client(service.url, "k") as client:
        version = client.upload(
            "pirate", *adapter_files(adapter), progress=lambda done, total: sent.append(done)
        )
    assert version["version"] == 2
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert max(sent) == size
    assert json.loads(service.requests[0][3]) == {"name": "pirate", "weights_bytes": size}
    bodies = {r[1]: r for r in service.requests if r[0] == "PUT"}
    assert bodies["/bucket/weights"][3] == b"weights" * 1000
    assert "authorization" not in bodies["/bucket/weights"][2]  # the URL is the permission
    assert {request[2]["x-kept"] for request in bodies.values()} == {"so"}

    refused = {"status": "refused", "error": {"message": "NaN in q_proj", "code": "not_finite"}}
    service.on("GET", f"{path}/u1", (200, refused))
    with Client(service.url, "k") as client, pytest.raises(RequestFailed, match="NaN in q_proj"):
        client.upload("pirate", *adapter_files(adapter))


def test_missing_files_of_an_adapter_are_named(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RequestFailed, match="safe_serialization"):
        adapter_files(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(RequestFailed, match="isn't a PEFT adapter"):
        adapter_files(adapter)


def test_answer_of_something_else_than_the_service(service: FakeService) -> None:
    service.on("GET", "/v1/adapters", (502, "<html>bad gateway</html>"))
    with Client(service.url, "k") as client, pytest.raises(RequestFailed, match="502"):
        client.pages("/v1/adapters")
