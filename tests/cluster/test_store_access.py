"""`loraplex store` on the embedded store: beside a service that runs, and on one at rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loraplex.adapter_store import EmbeddedS3
from loraplex.cluster.cli_store import store_app
from loraplex.cluster.local_dir import DataDir
from loraplex.cluster.settings import Settings
from loraplex.cluster.store_access import NoStore, open_store
from typer.testing import CliRunner

from tests.adapter_store.uploads import Service, upload


def test_the_embedded_store_is_found_running_and_at_rest(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path / "data")
    with pytest.raises(NoStore, match="--store"), open_store(settings):
        pass
    data = DataDir(settings.data_dir)
    data.open()
    with EmbeddedS3(data.store) as server:
        server.store().put("a", b"1")
        # A service holds the folder's lock: its server is used.
        with open_store(settings) as store:
            assert store.get("a")[0] == b"1"
            assert store.endpoint == server.endpoint
        service = Service(server.store(), tmp_path / "scratch")
        service.publish("bot", upload(1))
    data.close()
    target = tmp_path / "out"
    arguments = ["export", "acme", str(target), "--data-dir", str(settings.data_dir)]
    assert CliRunner().invoke(store_app, arguments).exit_code == 0
    assert (target / "bot/adapter_model.safetensors").read_bytes() == upload(1).weights


def test_commands_tell_by_their_exit_code(s3_server: EmbeddedS3, store, tmp_path: Path) -> None:
    service = Service(store, tmp_path / "scratch")
    version = service.publish("bot", upload(1))
    settings = {
        "store_endpoint": s3_server.endpoint,
        "store_access_key": s3_server.access_key,
        "store_secret_key": s3_server.secret_key,
    }

    def run(*arguments: str):
        options = [f"--set={name}={value}" for name, value in settings.items()]
        options += ["--store", store.url]
        if arguments[0] != "export":
            options += ["--data-dir", str(tmp_path / "data")]
        return CliRunner().invoke(store_app, [*arguments, *options])

    sound = run("check")
    assert (sound.exit_code, sound.output.strip()) == (0, "nothing is wrong")
    key = f"tenants/{service.tenant_id}/blobs/{version.digest}/{version.blob}/pack-v1.bin"
    store.delete(key)
    broken = run("check", "--json")
    assert broken.exit_code == 1
    assert [f["kind"] for f in json.loads(broken.output)] == ["missing_pack"]
    planned = run("repair", "--apply")
    assert planned.exit_code == 1
    assert "left (name the base model" in planned.output
    assert run("repair", "--older-than-hours", "0.1").exit_code == 2

    first = run("admin-key")
    assert (first.exit_code, first.output.startswith("lpx-admin-")) == (0, True)
    again = run("admin-key")
    assert "--rotate" in str(again.exception)
    assert service.catalogue.find_key(first.output.strip()) is not None
