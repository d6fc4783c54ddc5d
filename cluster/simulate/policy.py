"""What the simulator compares: a rule for requests, and one for what groups should hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .group import SimGroup
from .trace import TracedRequest


@dataclass(frozen=True)
class Advice:
    """What a group should hold: on the GPU, and in its node's memory."""

    desired: tuple[str, ...] = ()
    host: tuple[str, ...] = ()


class Policy(Protocol):
    """Looks at groups as gateways and the controller do: loads, residency, reports."""

    name: str
    tick_s: float | None  # between calls of `tick`; None: never
    fair: bool  # groups take tenants in turn; else requests as they come

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        """The name of the group, one of `groups`, which are those that live."""
        ...

    def tick(self, now_s: float, groups: Iterable[SimGroup]) -> Mapping[str, Advice]:
        """Advice by group; groups that aren't named keep theirs."""
        ...
