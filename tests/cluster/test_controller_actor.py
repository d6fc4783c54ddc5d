"""The controller in a real Ray, on a real object store: restart, epochs, the admin's metrics."""

from __future__ import annotations

import json
import os
import time
import urllib.request
import uuid

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from loraplex.adapter_store import Catalogue, ObjectStore, next_epoch
from loraplex.cluster.control import RoutingTable
from loraplex.cluster.control.actor import start_controller
from loraplex.cluster.named_actors import CONTROLLER_NAME
from loraplex.cluster.ports import free_port
from loraplex.cluster.settings import RAY_NAMESPACE, Settings
from loraplex.workers import EngineReport, GroupReport
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.gateway_fakes import publish

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        namespace=RAY_NAMESPACE,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture
def settings(s3_server) -> Settings:
    return Settings.load(
        store_url=f"{s3_server.url}/{uuid.uuid4().hex}",
        store_endpoint=s3_server.endpoint,
        store_access_key=s3_server.access_key,
        store_secret_key=s3_server.secret_key,
        metrics_port=free_port(),
    )


@pytest.fixture
def catalogue(settings) -> Catalogue:
    return Catalogue(ObjectStore(**settings.store_options()))


@pytest.fixture
def adapter(catalogue) -> str:
    """The key of a published adapter."""
    tenant = catalogue.create_tenant("acme")
    publish(catalogue, tenant.id, "style", "a" * 64)
    return f"{tenant.id}/{'a' * 64}"


@pytest.fixture
def controller(settings):
    actor = start_controller(settings)
    yield Caller(actor)
    ray.kill(actor)


class Caller:
    """Calls the actor and waits for the answer, for as long as it is starting."""

    def __init__(self, actor) -> None:
        self.actor = actor

    def __getattr__(self, name: str):
        def call(*args, timeout_s: float = 30.0):
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    return ray.get(getattr(self.actor, name).remote(*args), timeout=timeout_s)
                except ray.exceptions.RayError as error:
                    starting = "ControllerStarting" in str(error)
                    restarting = isinstance(error, ray.exceptions.RayActorError)
                    if not (starting or restarting) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)

        return call


def until(condition, timeout_s: float = 20.0):
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.1)
    return result


def group_report(seen_epoch: int = 0, gpu: tuple[str, ...] = ()) -> dict:
    engine = EngineReport(pool_bytes_total=100, gpu=dict.fromkeys(gpu, 10))
    report = GroupReport("workers", "g0", "127.0.0.1", 7000, 0, False, engine, seen_epoch)
    return report.to_wire()


def read(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode()


def test_it_serves_groups_gateways_and_operators_and_survives_its_own_death(
    settings, controller, adapter
):
    report = group_report(gpu=(adapter,))
    advice = {"epoch": 1, "desired": [adapter], "host": None, "purge": [], "release": False}
    assert controller.report(report) == advice

    def table() -> RoutingTable:
        controller.report(report)
        return RoutingTable.from_wire(controller.table((0, 0)))

    until(lambda: table().placement == {adapter: ("g0",)})
    controller.register_target("gateway", {"replica": "r0"}, "127.0.0.1", 9)
    assert [t.kind for t in controller.metrics_targets()] == ["controller", "gateway"]

    port = until(lambda: controller.status()["metrics_port"])
    assert port == settings.metrics_port
    listed = until(lambda: json.loads(read(port, "/metrics/targets")))
    assert {t["labels"]["kind"] for t in listed} >= {"controller"}
    families = {f.name: f for f in text_string_to_metric_families(read(port, "/metrics"))}
    (epoch,) = families["loraplex_controller_epoch"].samples
    assert (epoch.value, epoch.labels) == (1, {"kind": "controller", "replica": "controller"})
    assert {s.labels["state"] for s in families["loraplex_controller_groups"].samples} == {
        "serving",
        "draining",
    }

    # Killed, it comes back by itself, under the next epoch and on the same port.
    ray.kill(controller.actor, no_restart=False)
    assert until(lambda: controller.status()["epoch"] == 2)
    assert controller.report(group_report(seen_epoch=1))["epoch"] == 2
    until(lambda: controller.status()["metrics_port"] == settings.metrics_port)
    until(lambda: "loraplex_controller_epoch" in read(port, "/metrics"))
    # Whoever starts it once more finds the one that runs.
    again = Caller(start_controller(settings))
    assert again.status()["epoch"] == 2
    assert ray.get_actor(CONTROLLER_NAME, namespace=RAY_NAMESPACE) == controller.actor


def test_adapters_that_were_deleted_without_it_are_purged_when_it_is_back(
    catalogue, controller, adapter
):
    tenant_id = adapter.partition("/")[0]
    publish(catalogue, tenant_id, "other", "b" * 64)
    other = f"{tenant_id}/{'b' * 64}"
    report = group_report(gpu=(adapter, other))
    controller.report(report)
    ray.kill(controller.actor, no_restart=False)
    catalogue.delete_adapter(tenant_id, "style")
    told = until(lambda: controller.report(report)["purge"])
    assert told == [adapter]

    def placement() -> dict:
        controller.report(report)
        return dict(RoutingTable.from_wire(controller.table((0, 0))).placement)

    until(lambda: placement() == {other: ("g0",)})


def test_a_store_that_lost_its_memory_does_not_stop_it(controller):
    controller.report(group_report(seen_epoch=41))
    until(lambda: controller.status()["epoch"] > 41)
    assert controller.report(group_report(seen_epoch=41))["epoch"] > 41


def test_a_superseded_controller_gives_no_more_advice(settings, controller):
    assert controller.report(group_report())["epoch"] == 1
    newer = next_epoch(ObjectStore(**settings.store_options()))
    controller.report(group_report(seen_epoch=newer))

    def refused() -> bool:
        try:
            controller.report(group_report(seen_epoch=newer))
        except ray.exceptions.RayTaskError as error:
            return "ControllerSuperseded" in str(error)
        return False

    assert until(refused)


def test_without_its_store_it_waits_and_says_so(settings):
    away = settings.changed(store_endpoint="http://127.0.0.1:9")
    actor = start_controller(away)
    try:
        with pytest.raises(ray.exceptions.RayTaskError, match="no epoch yet"):
            ray.get(actor.report.remote(group_report()), timeout=30)
    finally:
        ray.kill(actor)
