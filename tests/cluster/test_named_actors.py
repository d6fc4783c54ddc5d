"""Named actors that aren't there, or don't answer, without a Ray cluster."""

from __future__ import annotations

import time
from typing import Any

import pytest
from loraplex.cluster import named_actors
from loraplex.cluster.errors import ActorUnavailable
from ray.exceptions import RayError


def missing(name: str, **options: Any) -> None:
    raise ValueError("no such actor")


def broken(name: str, **options: Any) -> None:
    raise RayError("the head is away")


def hanging(name: str, **options: Any) -> None:
    time.sleep(0.3)


@pytest.mark.parametrize("method", ["call", "send"])
@pytest.mark.parametrize("find", [missing, broken, hanging])
async def test_an_actor_that_cant_be_reached_is_unavailable_in_time(monkeypatch, find, method):
    monkeypatch.setattr(named_actors.ray, "get_actor", find)
    monkeypatch.setattr(named_actors, "CALL_S", 0.05)
    monkeypatch.setattr(named_actors.NamedActor.call, "__kwdefaults__", {"timeout_s": 0.05})
    with pytest.raises(ActorUnavailable, match="'controller'"):
        await getattr(named_actors.NamedActor("controller"), method)("status")
