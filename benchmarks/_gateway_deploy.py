"""Deploys what benchmarks/gateway.py measures. Imports Ray, whose settings must stand by then."""

from __future__ import annotations

import time

import _gateway_apps
import ray
from loraplex.cluster import local_ray, serve_app
from loraplex.cluster.local_run import LocalRun, StartFailed
from loraplex.cluster.settings import Settings
from loraplex.cluster.worker_group import WorkerGroupConfig, worker_group_app
from ray import serve

BARE_PATH = "/bare"
_START_S = 120.0

ray.cloudpickle.register_pickle_by_value(_gateway_apps)  # type: ignore[attr-defined]


def start_gateway(run: LocalRun) -> None:
    """The real gateway, a group with the stand-in, and the probe of both hops."""
    settings = run.settings
    local_ray.start_serve(settings, run.data.ray_logs)
    serve_app.start_actors(settings)
    gateway, group = serve_app.gateway_app(settings), _group(settings)
    _deploy(
        serve.RunTarget(gateway, name=serve_app.GATEWAY_APP, route_prefix="/"),
        serve.RunTarget(group, name=serve_app.GROUPS_APP, route_prefix=None),
        serve.RunTarget(
            _gateway_apps.probe_app(settings.secret_bytes()), name="probe", route_prefix=None
        ),
    )


def start_bare(chunk: str) -> None:
    """Adds the bare app, which answers every request with copies of `chunk`."""
    _deploy(serve.RunTarget(_gateway_apps.bare_app(chunk), name="bare", route_prefix=BARE_PATH))


async def probe(
    way: str, at_once: int, calls: int, tokens: int, pace_us: int
) -> tuple[list[float], list[float]]:
    """`HopProbe.measure`."""
    handle = serve.get_app_handle("probe")
    return await handle.measure.remote(way, at_once, calls, tokens, pace_us)


def _group(settings: Settings) -> serve.Application:
    config = WorkerGroupConfig(
        deployment=serve_app.GROUPS_DEPLOYMENT,
        program=_gateway_apps.StandInProgram(),
        secret=settings.secret_bytes(),
    )
    return worker_group_app(config, groups=1)


def _deploy(*targets: serve.RunTarget) -> None:
    serve.run_many(list(targets), wait_for_applications_running=False)
    names = {target.name for target in targets}
    deadline = time.monotonic() + _START_S
    while not names <= {n for n, a in serve.status().applications.items() if a.status == "RUNNING"}:
        failure = serve_app.failure()
        if failure is not None or time.monotonic() > deadline:
            raise StartFailed(failure or f"{', '.join(names)}: not running in {_START_S:g} s")
        time.sleep(0.1)
