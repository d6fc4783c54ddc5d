"""The live system's own policy: the controller's core and the gateway's `decide`, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

from ..control import Controller, ControllerConfig
from ..prefix_record import BLOCK_TOKENS, PrefixRecord
from ..routing import DEFAULT_POLICY, Ask, RoutingPolicy, decide
from .group import SimGroup
from .policy import Advice
from .trace import TracedRequest


class Loraplex:
    """One gateway and one controller.

    The gateway has fresh loads, as it has them from the groups' token batches, and the table of
    the controller's last tick.

    Args:
        fair: groups take tenants in turn, as they do; else requests as they come, to compare with.
    """

    def __init__(
        self,
        config: ControllerConfig | None = None,
        policy: RoutingPolicy = DEFAULT_POLICY,
        tick_s: float = 0.5,
        fair: bool = True,
    ) -> None:
        self.name, self.fair = "loraplex" if fair else "loraplex-fcfs", fair
        self.tick_s: float | None = tick_s
        self._now = 0.0
        self._controller = Controller(config or ControllerConfig(), lambda: self._now)
        self._policy = policy
        self._prefixes = PrefixRecord()

    def route(self, now_s: float, request: TracedRequest, groups: Mapping[str, SimGroup]) -> str:
        table = self._controller.routing_table
        prefix = f"{request.tenant}/{request.adapter}/{request.prefix}"
        prompt_hash = int.from_bytes(blake2b(prefix.encode(), digest_size=8).digest(), "little")
        blocks = [prompt_hash + i for i in range(request.prefix_tokens // BLOCK_TOKENS)]
        ask = Ask(
            request.adapter,
            prompt_hash,
            request.prompt_tokens,
            self._prefixes.cached(blocks),
            request.tenant,
        )
        loads = {name: group.load() for name, group in groups.items()}
        dead = frozenset(table.serving.keys() - groups.keys())
        decision = decide(table, ask, loads, dead, self._policy)
        # Before the controller's first table there is nobody to ask.
        chosen = decision.entry.group if decision else min(groups)
        self._prefixes.note(blocks, chosen)
        return chosen

    def tick(self, now_s: float, groups: Iterable[SimGroup]) -> Mapping[str, Advice]:
        self._now = now_s
        advice = {}
        for group in groups:
            told = self._controller.take(group.group_report())
            advice[group.name] = Advice(tuple(told["desired"]), tuple(told["host"] or ()))
        self._controller.tick()
        return advice
