"""The cluster's parts put together: named actors, and Ray Serve's applications."""

from __future__ import annotations

import os
from typing import cast

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from .control.actor import start_controller
from .gateway.deployment import GATEWAY_CPUS, Gateway
from .group_scaling import TARGET_FILL
from .ingest import start_ingest
from .limiter_actor import start_limiter
from .model import base_model
from .rank_program import rank_program
from .settings import Settings
from .worker_group import WorkerGroupConfig, worker_group_app

GATEWAY_APP = "gateway"
GROUPS_APP = "groups"
GROUPS_DEPLOYMENT = "WorkerGroup"
# Ray counts these to place processes; they aren't what a process may use.
RANK_CPUS = 0.5
FRONT_CPUS = 0.1
_ACTOR_START_S = 60.0


def rank_threads(settings: Settings) -> int:
    """Threads of torch in one rank: the machine's cores are shared by all of its ranks."""
    if settings.torch_threads:
        return settings.torch_threads
    return max(1, (os.cpu_count() or 1) // (settings.groups * settings.tp))


def start_actors(settings: Settings) -> None:
    """Starts controller, ingest and limiter, each unless it runs already, and waits for them."""
    actors = [
        start_controller(settings),
        start_ingest(settings, base_model(settings)),
        start_limiter(settings),
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=_ACTOR_START_S)


def build_apps(settings: Settings) -> list[serve.RunTarget]:
    """Serve's applications: the gateway, and the worker groups of the one model.

    They are apart because requests don't go from one to the other through Serve, and because
    another model or tp size is one more application.

    Args:
        settings: with the cluster secret, the model and the device settled.
    """
    return [
        serve.RunTarget(gateway_app(settings), name=GATEWAY_APP, route_prefix="/"),
        serve.RunTarget(groups_app(settings), name=GROUPS_APP, route_prefix=None),
    ]


def gateway_app(settings: Settings) -> serve.Application:
    """Settings as for `build_apps`."""
    return Gateway.options(
        num_replicas=settings.gateway_replicas,
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_s,
    ).bind(settings)


def groups_app(settings: Settings) -> serve.Application:
    """Settings as for `build_apps`."""
    threads = rank_threads(settings)
    on_gpu = settings.device == "cuda"
    token = settings.metrics_token
    config = WorkerGroupConfig(
        deployment=GROUPS_DEPLOYMENT,
        program=rank_program(settings, base_model(settings), threads),
        secret=settings.secret_bytes(),
        tp_size=settings.tp,
        rank_cpus=RANK_CPUS,
        rank_gpus=1.0 if on_gpu else 0.0,
        front_cpus=FRONT_CPUS,
        threads=threads,
        host=settings.internal_host,
        metrics_host=settings.metrics_host,
        metrics_token=token.get_secret_value() if token else None,
        step_timeout_s=settings.step_timeout_s,
        drain_timeout_s=settings.drain_s,
        logs=settings.logs,
        trace_endpoint=settings.trace_endpoint,
    )
    target = TARGET_FILL * settings.max_running
    return worker_group_app(config, settings.groups, settings.max_groups, target)


def deploy(settings: Settings) -> None:
    """Hands the applications to Serve and returns at once; `progress` tells how far they are."""
    serve.run_many(
        build_apps(settings),
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def all_running() -> bool:
    apps = serve.status().applications
    return all(
        name in apps and apps[name].status == ApplicationStatus.RUNNING
        for name in (GATEWAY_APP, GROUPS_APP)
    )


def progress() -> str:
    """Replicas that run, by deployment: "Gateway 1 of 1, WorkerGroup 0 of 2"."""
    parts = []
    for app in serve.status().applications.values():
        for name, deployment in app.deployments.items():
            # Declared as an enum's members, but Serve puts their names in.
            states = cast("dict[str, int]", deployment.replica_states)
            wanted = sum(count for state, count in states.items() if state != "STOPPING")
            parts.append(f"{name} {states.get('RUNNING', 0)} of {wanted}")
    return ", ".join(sorted(parts))


def failure() -> str | None:
    """Why an application can't start, as its replica said it; None while it may still come up."""
    for name, app in serve.status().applications.items():
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            reasons = [d.message for d in app.deployments.values() if d.message] or [app.message]
            return f"the application {name!r} did not start: {_cause(reasons[0])}"
    return None


def _cause(message: str) -> str:
    """The last exception's own line of a message that holds a whole remote traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if _is_error_line(line)]
    if not errors:
        return lines[-1] if lines else "no reason given"
    name, _, text = errors[-1].partition(": ")
    return f"{name.rpartition('.')[2]}: {text}"


def _is_error_line(line: str) -> bool:
    name, colon, rest = line.partition(": ")
    last = name.rpartition(".")[2]
    return bool(
        colon
        and rest
        and " " not in name
        and last[:1].isupper()
        and last.isidentifier()
        and not last.startswith("Ray")
    )
