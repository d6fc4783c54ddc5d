"""Several Ray nodes on this machine, and the service on them as deploy/kuberay has it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from _serving_load import DEMO
from loraplex.adapter_store import Catalogue, EmbeddedS3, ObjectStore, host_folder
from loraplex.cluster.local_ray import OBJECT_STORE_BYTES, make_token, ray_environment, stop_ray
from loraplex.cluster.ports import free_port
from loraplex.cluster.settings import RAY_NAMESPACE, Settings
from loraplex.cluster.up_demo import Demo, seed

SERVE = DEMO.parent / "kuberay/base/serve.yaml"
DATA = "data"  # of each node
READY_S = 240.0
POLL_S = 0.2
GATEWAYS = 2
# Groups of one address would count as one node's. All of 127.0.0.0/8 is this machine's.
_ADDRESS = "127.0.0.{}"


class Nodes:
    """The head with controller and a gateway, a node with the other gateway, and nodes for groups.

    Each has, as a pod has, an address and a working directory of its own; `data_dir` is relative
    to it, so that each has packs of its own.

    Args:
        folder: of all that they write.
        slots: groups that a node has room for.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder = folder
        self.slots = slots
        self._cluster: Any = None
        self._made = 0
        self._alive: dict[str, psutil.Process] = {}  # raylets of the groups' nodes, by address

    @property
    def addresses(self) -> list[str]:
        """Of the groups' nodes that weren't killed."""
        return list(self._alive)

    def start(self, group_nodes: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._add(2, {"control": 1, "gateway": 1})
        self._add(1, {"gateway": 1})
        for _ in range(group_nodes):
            self.add()
        ray.init(self._cluster.address, namespace=RAY_NAMESPACE, log_to_driver=False)
        # From now on nodes are added in a thread, which can't handle signals. They end soon after
        # the head, should this process be killed.
        self._cluster._shutdown_at_exit = False

    def add(self) -> str:
        """A node for groups; its address."""
        node = self._add(self.slots, {"group": self.slots})
        pid = node.all_processes["raylet"][0].process.pid
        self._alive[node.node_ip_address] = psutil.Process(pid)
        return node.node_ip_address

    def processes(self, address: str) -> list[psutil.Process]:
        """Of a groups' node, Ray's own first."""
        return _tree(self._alive[address].pid)

    def forget(self, address: str) -> None:
        """It was killed."""
        del self._alive[address]

    def replicas(self, app: str) -> set[int]:
        """Ids of the processes of an application's replicas."""
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:{app}:"):
                    found.add(process.pid)
        return found

    def end(self) -> None:
        """Kills all that was started."""
        stop_ray(stop_serve=False)
        for node in self._cluster.list_all_nodes() if self._cluster is not None else ():
            left = [c for p in node.live_processes() for c in _tree(p[1].pid)]
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            signal_all(left, signal.SIGKILL)
        for home in self._folder.glob("node-*"):
            shutil.rmtree(host_folder(home / DATA / "packs"), ignore_errors=True)

    def _add(self, cpus: int, resources: dict[str, int]) -> Any:
        self._made += 1
        home = self._folder / f"node-{self._made}"
        home.mkdir()
        with contextlib.chdir(home):  # which its processes inherit
            return self._cluster.add_node(
                num_cpus=cpus,
                resources=resources,
                node_ip_address=_ADDRESS.format(self._made),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Sends it to all that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def deploy(**args: Any) -> None:
    """Hands the applications to Serve, like `serve deploy` of a config with these `args`."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(SERVE.read_text())
    gateway, groups = config["applications"]
    gateway["deployments"][0]["autoscaling_config"]["min_replicas"] = GATEWAYS
    # Pods with GPUs are what groups need; here it is a resource that stands for them.
    bundles = [{"CPU": 0.1, "group": 1}, {"CPU": 0.5}]
    groups["deployments"] = [{"name": "WorkerGroup", "placement_group_bundles": bundles}]
    for app in (gateway, groups):
        app["args"] = args
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def wait_running(timeout_s: float = READY_S) -> None:
    """Raises RuntimeError when an application failed or isn't running in time."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while True:
        apps = serve.status().applications
        if apps and all(app.status == "RUNNING" for app in apps.values()):
            return
        failed = [app.message for app in apps.values() if app.status == "DEPLOY_FAILED"]
        if failed or time.monotonic() > deadline:
            raise RuntimeError(f"the applications don't run: {failed or apps}")
        time.sleep(POLL_S)


@contextmanager
def nodes_service(
    group_nodes: int, slots: int, **settings: object
) -> Iterator[tuple[Nodes, dict[str, Any]]]:
    """The demo, ready, on nodes of this machine.

    Args:
        group_nodes, slots: nodes for groups, and groups that each has room for.
        settings: of the service, beside those that a cluster needs.

    Yields:
        The nodes, and the facts that demo.json tells of a `loraplex up`.
    """
    with tempfile.TemporaryDirectory(prefix="lrpx-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        store = stack.enter_context(EmbeddedS3(folder / "store"))
        values = {
            "cluster_secret": secrets.token_hex(32),
            "control_resource": "control",
            "data_dir": DATA,
            "device": "cpu",
            "internal_host": "0.0.0.0",  # each is found at its node's address
            "model_path": DEMO / "model",
            "served_model_name": Demo.find(DEMO).base_name,
            "store_access_key": store.access_key,
            "store_endpoint": store.endpoint,
            "store_secret_key": store.secret_key,
            "store_url": store.url,
            "torch_threads": 1,
        }
        given = {f"LORAPLEX_{k.upper()}": str(v) for k, v in (values | settings).items()}
        stack.enter_context(_environment(given))
        make_token(token := folder / "ray.token")
        loopback = Settings.load(internal_host="127.0.0.1")
        stack.enter_context(_environment(ray_environment(loopback, token)))
        # Of all that Ray writes; without it, others' `ray.init()` would find this cluster.
        stack.enter_context(_environment({"RAY_TMPDIR": name}))
        nodes = Nodes(folder, slots)
        stack.callback(nodes.end)
        nodes.start(group_nodes)
        url = _start(free_port())
        key = Catalogue(ObjectStore(**Settings.load().store_options())).ensure_admin_key()
        assert key is not None
        yield nodes, seed(Demo.find(DEMO), url, key, lambda text: None)


def _start(port: int) -> str:
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    deploy()
    wait_running()
    return f"http://127.0.0.1:{port}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
