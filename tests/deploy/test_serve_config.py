"""deploy/kuberay/base/serve.yaml on a real Ray: what `serve deploy` and KubeRay hand to Serve."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from loraplex.adapter_store import Catalogue, EmbeddedS3, ObjectStore
from loraplex.cluster.errors import SettingsError
from loraplex.cluster.ports import free_port
from loraplex.cluster.serve_builders import cluster_settings
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "deploy/kuberay/base/serve.yaml"


def test_a_cluster_without_its_settings_is_told_all_that_is_missing() -> None:
    with pytest.raises(SettingsError) as caught:
        cluster_settings({"tp": 2})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "cluster_secret",
        "device",
        "model_path",
        "store_url, store_endpoint",
    ]


@pytest.fixture
def cluster(
    s3_server: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """A Ray whose processes have the settings in their environment, as pods do."""
    variables = {
        "LORAPLEX_CLUSTER_SECRET": os.urandom(32).hex(),
        "LORAPLEX_DEVICE": "cpu",
        "LORAPLEX_MODEL_PATH": str(ROOT / "deploy/demo/model"),
        "LORAPLEX_SERVED_MODEL_NAME": "loraplex-demo",
        "LORAPLEX_STORE_URL": f"{s3_server.url}/{os.urandom(8).hex()}",
        "LORAPLEX_STORE_ENDPOINT": str(s3_server.endpoint),
        "LORAPLEX_STORE_ACCESS_KEY": s3_server.access_key,
        "LORAPLEX_STORE_SECRET_KEY": s3_server.secret_key,
        "LORAPLEX_DATA_DIR": str(tmp_path),
        "LORAPLEX_GROUPS": "1",
        "LORAPLEX_MAX_GROUPS": "2",
        "LORAPLEX_INTERNAL_HOST": "0.0.0.0",  # groups must tell an address that can be reached
        "LORAPLEX_CONTROL_RESOURCE": "control",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ray.init(
        num_cpus=6,
        resources={"control": 1, "gateway": 2},
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )
    yield variables
    serve.shutdown()
    ray.shutdown()


@pytest.mark.cluster
def test_the_serve_config_deploys_and_a_tenant_is_answered(cluster: dict[str, str]) -> None:
    port = free_port()
    config = yaml.safe_load(SERVE.read_text())
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    deadline = time.monotonic() + 120
    while True:
        apps = serve.status().applications
        states = {name: app.status for name, app in apps.items()}
        if set(states.values()) == {"RUNNING"}:
            break
        failed = [app.message for app in apps.values() if app.status == "DEPLOY_FAILED"]
        assert not failed
        assert time.monotonic() < deadline, apps
        time.sleep(0.2)
    assert set(states) == {"gateway", "groups"}
    deployments = {n: d for app in apps.values() for n, d in app.deployments.items()}
    replicas = {n: sum(d.replica_states.values()) for n, d in deployments.items()}
    assert replicas == {"Gateway": 2, "WorkerGroup": 1}

    settings = cluster_settings({})
    catalogue = Catalogue(ObjectStore(**settings.store_options()))
    tenant = catalogue.create_tenant("acme")
    _, key = catalogue.create_key(tenant.id)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"authorization": f"Bearer {key}"},
        trust_env=False,
        timeout=60,
    ) as http:
        while http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        body = {"model": "loraplex-demo", "prompt": "In the beginning", "max_tokens": 4}
        answers = {http.post("/v1/completions", json=body | {"temperature": 0}).text for _ in "ab"}
    assert all("choices" in text for text in answers)
