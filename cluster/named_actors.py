"""The cluster's named actors: what they are called, how one is started, and how one is called."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from .errors import ActorUnavailable
from .settings import RAY_NAMESPACE

CONTROLLER_NAME = "controller"
INGEST_NAME = "ingest"
LIMITER_NAME = "limiter"

CALL_S = 5.0


def start_named(name: str, kind: type, *args: Any, **options: Any) -> Any:
    """The actor of this name, a new `kind(*args)` if there is none. It outlives its creator, and
    Ray starts it again whenever it ends.

    Args:
        options: of this actor alone (`num_cpus`, `max_concurrency`).
    """
    actor = ray.remote(kind).options(
        name=name,
        namespace=RAY_NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        **options,
    )
    return actor.remote(*args)


class NamedActor:
    """Calls one named actor, which may be restarted or not be there yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_S) -> Any:
        """Raises ActorUnavailable when there is no such actor or it doesn't answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(await self._find(), method).remote(*args)
        except (RayError, TimeoutError) as error:
            raise self._unavailable(error, timeout_s) from error

    async def send(self, method: str, *args: Any) -> None:
        """Begins a call and doesn't wait for its end. Raises ActorUnavailable."""
        try:
            async with asyncio.timeout(CALL_S):
                getattr(await self._find(), method).remote(*args)
        except (RayError, TimeoutError) as error:
            raise self._unavailable(error, CALL_S) from error

    def _unavailable(self, error: Exception, timeout_s: float) -> ActorUnavailable:
        self._handle = None  # a new one of that name may be there next time
        reason = str(error).splitlines()[0] if str(error) else f"no answer in {timeout_s:g} s"
        return ActorUnavailable(f"the actor {self._name!r} failed: {reason}")

    async def _find(self) -> Any:
        if self._handle is None:
            try:
                # Blocks while Ray's head is away, which must not stop the event loop.
                self._handle = await asyncio.to_thread(
                    ray.get_actor, self._name, namespace=RAY_NAMESPACE
                )
            except ValueError:
                raise ActorUnavailable(f"there is no actor named {self._name!r} yet") from None
        return self._handle
