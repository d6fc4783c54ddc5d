"""deploy/kuberay/base/serve.yaml on a real Ray: what `serve deploy` and KubeRay hand to Serve."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
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

from tests.e2e.runs import alive

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "deploy/kuberay/base/serve.yaml"
WAIT_S = 120.0


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


@pytest.fixture(scope="module")
def cluster(
    s3_server: EmbeddedS3, tmp_path_factory: pytest.TempPathFactory
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
        "LORAPLEX_DATA_DIR": str(tmp_path_factory.mktemp("data")),
        "LORAPLEX_DRAIN_S": "100",
        "LORAPLEX_GROUPS": "1",
        "LORAPLEX_MAX_GROUPS": "2",
        "LORAPLEX_UPDATE_SURGE": "100",
        "LORAPLEX_INTERNAL_HOST": "0.0.0.0",  # groups must tell an address that can be reached
        "LORAPLEX_CONTROL_RESOURCE": "control",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
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


def deploy(**args: Any) -> None:
    """What `serve deploy` does with the config, after it was given these settings."""
    config = yaml.safe_load(SERVE.read_text())
    for app in config["applications"]:
        app["args"] = args
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        apps = serve.status().applications
        assert not [app.message for app in apps.values() if app.status == "DEPLOY_FAILED"]
        assert time.monotonic() < deadline, apps
        time.sleep(0.2)


def all_run() -> bool:
    apps = serve.status().applications
    return {app.status for app in apps.values()} == {"RUNNING"}


def replicas() -> set[int]:
    """Process ids of gateways and groups."""
    titles = ("ray::ServeReplica:gateway", "ray::ServeReplica:groups")
    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if alive(p) and " ".join(p.cmdline()).startswith(titles)}


@pytest.fixture(scope="module")
def tenant(cluster: dict[str, str]) -> Iterator[httpx.Client]:
    """A tenant of the service, once it is ready."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    deploy()
    wait_until(all_run)
    catalogue = Catalogue(ObjectStore(**cluster_settings({}).store_options()))
    _, key = catalogue.create_key(catalogue.create_tenant("acme").id)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"authorization": f"Bearer {key}"},
        trust_env=False,
        timeout=60,
    ) as http:
        wait_until(lambda: http.get("/ready").status_code == 200)
        yield http


def ask(http: httpx.Client, max_tokens: int) -> str:
    """A streamed greedy completion; "" if it broke."""
    body = {"model": "loraplex-demo", "prompt": "In the beginning", "max_tokens": max_tokens}
    body |= {"temperature": 0, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if response.is_error or lines.pop() != "[DONE]":
        return ""
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


@pytest.mark.cluster
def test_the_serve_config_deploys_and_a_tenant_is_answered(tenant: httpx.Client) -> None:
    apps = serve.status().applications
    assert set(apps) == {"gateway", "groups"}
    deployments = {n: d for app in apps.values() for n, d in app.deployments.items()}
    counts = {n: sum(d.replica_states.values()) for n, d in deployments.items()}
    assert counts == {"Gateway": 2, "WorkerGroup": 1}
    assert ask(tenant, 4)


@pytest.mark.cluster
def test_an_update_replaces_gateways_and_groups_and_breaks_no_stream(tenant: httpx.Client) -> None:
    lengths = (24, 120)
    expected = {n: ask(tenant, n) for n in lengths}
    assert all(expected.values())
    before, updated = replicas(), threading.Event()
    assert len(before) == 3

    def client(number: int) -> list[bool]:
        right = []
        while not updated.is_set():
            right.append(ask(tenant, lengths[number]) == expected[lengths[number]])
        return right

    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = [pool.submit(client, i) for i in range(len(lengths))]
        try:
            deploy(max_running=32)
            wait_until(lambda: not replicas() & before and all_run())
        finally:
            updated.set()
    assert all(all(a.result()) and a.result() for a in answers)
    assert len(replicas()) == 3
