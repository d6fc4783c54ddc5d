"""A Ray of our own on this machine: loopback only, small, and quiet."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from .errors import ClusterError
from .settings import RAY_NAMESPACE, Settings
from .up_checks import port_in_use

# Only task arguments pass through it; Ray asks for at least 75 MiB.
OBJECT_STORE_BYTES = 80 << 20
SERVE_STOP_S = 12.0


class RayStartError(ClusterError):
    """Ray didn't start; the message says where its logs are."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ray_environment(settings: Settings, token_path: Path | None) -> dict[str, str]:
    """Variables that Ray's processes must be started with; set them before `import ray`."""
    env = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A worker must not find this repository's folders as top-level packages: transformers
        # would take `kernels` for the package of that name.
        "PYTHONSAFEPATH": "1",
        # The gateway answers in its own event loop: no thread hop per request, no log flush.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    if is_loopback(settings.internal_host):
        # The only switch with which Ray 2.60 takes 127.0.0.1 for the node's address on Linux;
        # with any other address its daemons listen on all interfaces.
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # The ranks of a group would listen on the address of the machine's name.
        env["GLOO_SOCKET_IFNAME"] = "lo"
    if settings.haproxy:
        env["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        # Without these two a shutdown takes half a minute.
        env["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
        env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = "2"
    if token_path is not None:
        env["RAY_AUTH_MODE"] = "token"
        env["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    return env


def make_token(path: Path) -> None:
    """The secret that Ray's processes show each other; kept, so that `ray status` can use it."""
    if not path.exists():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(32))


def start_ray(run_dir: Path, num_cpus: int, num_gpus: int, logs: Path) -> None:
    """Starts Ray's daemons as children of this process and connects to them.

    The working directory must be `run_dir` already: workers inherit it.

    Raises:
        RayStartError: with the folder of its logs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace=RAY_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(run_dir),
        )
    except Exception as error:
        raise RayStartError(f"Ray did not start: {error}. Its logs are in {logs}") from error


def daemons() -> list[psutil.Process]:
    """Ray's two daemons, without which nothing works; children of this process."""
    names = ("gcs_server", "raylet")
    return [p for p in psutil.Process().children() if p.name() in names]


def start_serve(settings: Settings, logs: Path) -> None:
    """Starts Ray Serve's controller and its HTTP proxy on the head node.

    Raises:
        CheckError: somebody has taken the proxy's port since it was checked.
        RayStartError: with the folder of its logs.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    host = "0.0.0.0" if settings.haproxy and not is_loopback(settings.host) else settings.host
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": settings.port},
            logging_config={
                "encoding": "TEXT",
                "log_level": "WARNING",
                "enable_access_log": False,
            },
        )
    except Exception as error:
        reason = str(getattr(error, "cause", error))  # without the proxy's own traceback
        if reason.startswith("Failed to bind"):
            raise port_in_use(settings.host, settings.port) from error
        raise RayStartError(f"Ray Serve did not start: {reason}. Its logs are in {logs}") from error


def stop_ray(stop_serve: bool = True) -> None:
    """Ends Serve, for a few seconds at most, and Ray. Safe in any state of the start."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    if stop_serve and "ray.serve" in sys.modules:
        from ray import serve

        # Serve waits up to 30 s for a controller that is stuck; a thread can be left behind.
        # It may also miss its controller's end and ask a dead one: that end is watched for, too.
        controller = _serve_controller()
        thread = threading.Thread(target=_quietly(serve.shutdown), daemon=True)
        thread.start()
        deadline = time.monotonic() + SERVE_STOP_S
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.1)
            if controller is not None and not _is_alive(controller):
                thread.join(1.0)
                break
    _quietly(ray.shutdown)()


def _serve_controller() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::ServeController"):
                return process
    return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _quietly(call: Any) -> Any:
    def run() -> None:
        try:
            call()
        except Exception:
            logging.getLogger(__name__).debug("while stopping", exc_info=True)

    return run
