"""The front of a worker group: the asyncio server between gateways and rank 0. No torch, no Ray.

Gateways connect to `port`, ranks to `rank_link`. A request passes admission, goes to rank 0 at
once (the engine's scheduler owns the queue and its fairness), and its tokens come back in one
message per step, which is cut up by gateway connection.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine_process import LinkAddress
from ..errors import GroupFailed
from ..rank_watch import WATCH_EVERY_S, RankWatch
from ..report import EngineReport
from ..request import ErrorCode, GenerationRequest
from ..wire import DEAD_AFTER_S, PING_EVERY_S, Frame, encode, error_output
from .front_links import GatewayLink, RankLink
from .streams import Client, Output, StreamTable
from .traces import RequestTrace, TracedRequests

log = logging.getLogger(__name__)

_POLL_S = 0.02
_STOP_S = 5.0  # how long ranks get to end by themselves


@dataclass(frozen=True)
class FrontConfig:
    """One group's front.

    Args:
        group: the group's name; a gateway that looks for another one is told so.
        secret: the cluster secret, which gateways hold too.
        host: address of the listener for gateways.
        port: its port, 0 for any free one.
        ranks: processes of the group.
        max_open: requests that the engine may have, waiting and running; more are refused with
            "overloaded", continuations beyond twice as many. A tenant may have as many as places
            are free: one alone gets half of them, and whatever it sends there is room for others.
        max_held_tokens: tokens that may wait for slow clients, over all streams.
        step_timeout_s: rank 0 counts as hung when one step takes longer.
        beat_timeout_s: a rank counts as hung when its process sends nothing for so long.
    """

    group: str
    secret: bytes = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 0
    ranks: int = 1
    max_open: int = 512
    max_held_tokens: int = 65536
    step_timeout_s: float = 30.0
    beat_timeout_s: float = 3.0


class GroupFront:
    """Serves one group. All methods belong to the event loop that called `start`."""

    def __init__(self, config: FrontConfig, on_trace: Callable[[RequestTrace], None] | None = None):
        """
        Args:
            on_trace: told what became of each request that somebody traces.
        """
        self.config = config
        self._traces = TracedRequests(config.group, on_trace)
        self.report = EngineReport()  # the engine's newest
        self.draining = False
        self.failure: str | None = None  # why the group can't serve any more
        self._streams = StreamTable(config.max_held_tokens)
        self._gateways: dict[Client, GatewayLink] = {}
        self._ranks: dict[int, RankLink] = {}
        self._up: set[int] = set()
        self._closing = False
        self._resident_version = 0
        self._told: Frame = {}  # the last ping
        self._desired: tuple[str, ...] | None = None
        self._host: tuple[str, ...] | None = None
        self._servers: list[asyncio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._link_secret = secrets.token_bytes(32)

    # Life

    async def start(self) -> None:
        """Opens both listeners. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        make_gateway = lambda: GatewayLink(self, self.config.secret)  # noqa: E731
        make_rank = lambda: RankLink(self, self._link_secret)  # noqa: E731
        self._servers = [
            await loop.create_server(make_gateway, self.config.host, self.config.port),
            # The ranks are on this node: their link never leaves it.
            await loop.create_server(make_rank, "127.0.0.1", 0),
        ]
        self._tasks = [loop.create_task(self._tick()), loop.create_task(self._watch_ranks())]

    @property
    def port(self) -> int:
        """Of the listener for gateways."""
        return self._servers[0].sockets[0].getsockname()[1]

    @property
    def rank_link(self) -> LinkAddress:
        """What the group's ranks need to reach this front."""
        host, port = self._servers[1].sockets[0].getsockname()[:2]
        return LinkAddress(host, port, self._link_secret)

    @property
    def ready(self) -> bool:
        return self.failure is None and len(self._up) == self.config.ranks

    async def wait_ready(self, timeout_s: float) -> None:
        """Until every rank is up.

        Raises:
            GroupFailed: a rank failed, or not all are up in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.ready:
            if self.failure is not None:
                raise GroupFailed(self.failure)
            if asyncio.get_running_loop().time() > deadline:
                missing = sorted(set(range(self.config.ranks)) - self._up)
                raise GroupFailed(f"ranks {missing} aren't up after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the open ones; whether all of them ended in time."""
        self.draining = True
        self._broadcast(encode({"t": "draining"}))
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self._streams.idle and self.failure is None:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return self._streams.idle

    async def close(self) -> None:
        """Ends open streams with "group_failed", stops the ranks, closes every connection."""
        if self._closing:
            return
        self._closing = True
        self._fail_streams("group_failed", "the group is shutting down")
        for server in self._servers:
            server.close()
        stop = encode({"t": "stop"})
        for rank in self._ranks.values():
            rank.send_bytes(stop)
        deadline = asyncio.get_running_loop().time() + _STOP_S
        while self._ranks and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_S)
        for rank in list(self._ranks.values()):
            rank.kill()
            rank.close("the group is shutting down")
        for gateway in list(self._gateways.values()):
            gateway.finish()
        for task in self._tasks:
            task.cancel()

    def fail(self, why: str, code: ErrorCode = "group_failed", ended: int | None = None) -> None:
        """The group can't serve any more: ends open streams; `failure` says why from now on.

        The ranks' processes are killed, but for `ended`, which ends by itself: the others may hang
        in a collective, or be stopped, and a new group needs what they hold.
        """
        if self.failure is None and not self._closing:
            self.failure = why
            log.error("group %s failed: %s", self.config.group, why)
            self._broadcast(encode({"t": "draining"}))
        self._fail_streams(code, why)
        for rank, link in self._ranks.items():
            if rank != ended:
                link.kill()

    # Load and advice

    @property
    def open(self) -> int:
        """Requests that the engine has, waiting and running."""
        return self._streams.running

    def load(self) -> Frame:
        """The load figures that travel with every batch.

        The sum of queued and running is exact; how it splits is as old as the engine's report.
        """
        running = min(self._streams.running, self.report.running)
        return {
            "queued": self._streams.running - running,
            "running": running,
            "free_pool": self.report.pool_bytes_total - self.report.pool_bytes_used,
            "resident_version": self._resident_version,
            "wait_s": self.report.wait_s,
            "turn_s": self.report.turn_s,
            "token_s": self.report.token_s,
        }

    def announcement(self) -> Frame:
        """What gateways are told about the group's adapters, at first and at each change."""
        return {
            "t": "report",
            "gpu": sorted(self.report.gpu),
            "load": self.load(),
            "floods": self.report.floods,
        }

    def advise(
        self, desired: Sequence[str], purge: Sequence[str], host: Sequence[str] | None = None
    ) -> None:
        """Passes the controller's advice on: keys of adapters to hold, to forget, and to keep in
        the node's memory; None: another group of the node is told of those."""
        leader = self._ranks.get(0)
        if leader is None:
            return
        if tuple(desired) != self._desired:
            self._desired = tuple(desired)
            leader.send({"t": "desired", "keys": list(desired)})
        if host is not None and tuple(host) != self._host:
            self._host = tuple(host)
            leader.send({"t": "host", "keys": list(host)})
        if purge:
            leader.send({"t": "purge", "keys": list(purge)})

    # GatewayEvents

    def greeting(self) -> Frame:
        return {"group": self.config.group, "report": self.announcement()}

    def joined(self, link: GatewayLink) -> None:
        self._gateways[link.client] = link
        if self.draining or self.failure is not None:
            link.send({"t": "draining"})

    def submit(self, link: GatewayLink, request: Mapping[str, Any], credit: int) -> None:
        """Admits a request, or answers it with the reason why not."""
        request_id = request["id"]
        refusal = self._refusal(request) or _unreadable(request) or self._tenants_limit(request)
        leader = self._ranks.get(0)
        if refusal or leader is None:
            code, text = refusal or ("draining", "rank 0 isn't connected")
            link.send_batch([error_output(request_id, code, text)], self.load())
            return
        stream = self._streams.add(link.client, request_id, credit, request["tenant"])
        self._traces.begin(stream.engine_id, request)
        leader.send({"t": "submit", "req": {**request, "id": stream.engine_id}})

    def abort(self, link: GatewayLink, request_id: str) -> None:
        engine_id = self._streams.abort(link.client, request_id)
        self._abort_in_engine([] if engine_id is None else [engine_id])

    def grant(self, link: GatewayLink, request_id: str, tokens: int) -> None:
        self._send_outputs({link.client: self._streams.grant(link.client, request_id, tokens)})

    def writable(self, link: GatewayLink) -> None:
        self._send_outputs({link.client: self._streams.resume(link.client)})

    def left(self, link: GatewayLink) -> None:
        """A gateway's connection is gone: its requests have nobody to answer to."""
        if self._gateways.pop(link.client, None) is not None:
            self._abort_in_engine(self._streams.remove(link.client))

    # RankEvents

    def rank_joined(self, rank: int, link: RankLink) -> None:
        self._ranks[rank] = link

    def rank_up(self, rank: int) -> None:
        self._up.add(rank)

    def rank_left(self, rank: int, why: str) -> None:
        self._ranks.pop(rank, None)
        self._up.discard(rank)
        if not self._closing:
            self.fail(f"the process of rank {rank} is gone: {why}")

    def rank_failed(self, rank: int, error: str) -> None:
        where = "the engine" if rank == 0 else f"rank {rank}"
        code = "engine_failed" if rank == 0 else "group_failed"
        self.fail(f"{where} failed: {error}", code, ended=rank)

    def take_batch(self, outputs: list[Output]) -> None:
        """One engine step's outputs."""
        self._traces.see(outputs)
        self._send_outputs(self._streams.route(outputs))
        errors, aborts = self._streams.trim()
        self._send_outputs(errors)
        self._abort_in_engine(aborts)

    def take_report(self, report: EngineReport) -> None:
        changed = report.gpu.keys() != self.report.gpu.keys()
        self.report = report
        if changed:
            self._resident_version += 1
            self._broadcast(encode(self.announcement()))
        elif self._ping() != self._told:
            # Gateways without streams here get no batches, and would go by a load long past.
            self._tell_load()

    # Inside

    def _refusal(self, request: Mapping[str, Any]) -> tuple[ErrorCode, str] | None:
        if self.failure is not None:
            return "draining", f"the group has failed and will be replaced: {self.failure}"
        if self.draining or self._closing:
            return "draining", "the group is shutting down and takes no new requests"
        # When a group dies, another gets all that it had begun, beside what it has itself.
        most = 2 * self.config.max_open if request.get("output") else self.config.max_open
        if self._streams.running >= most:
            return "overloaded", (
                f"the group has {self._streams.running} requests open, which is its limit; "
                "try again later"
            )
        return None

    def _tenants_limit(self, request: Mapping[str, Any]) -> tuple[ErrorCode, str] | None:
        mine, free = self._streams.running_of(request["tenant"]), self.config.max_open - self.open
        # A continuation takes the place that its tenant had at another group.
        if mine >= free and not request["output"]:
            return "overloaded", (
                f"you have {mine} requests open at this group, which is your limit while it has "
                f"{free} places left; wait for some of them to end"
            )
        return None

    def _fail_streams(self, code: ErrorCode, text: str) -> None:
        self._traces.drop_all(code)
        self._send_outputs(self._streams.fail_all(code, text))

    def _send_outputs(self, outputs: Mapping[Client, list[Output]]) -> None:
        for client, ready in outputs.items():
            link = self._gateways.get(client)
            if ready and link is not None:
                for request_id in link.send_batch(ready, self.load()):
                    self.abort(link, request_id)

    def _abort_in_engine(self, engine_ids: list[str]) -> None:
        self._traces.drop(engine_ids, "aborted")
        leader = self._ranks.get(0)
        if engine_ids and leader is not None:
            leader.send({"t": "abort", "ids": engine_ids})

    def _broadcast(self, data: bytes) -> None:
        """To all gateways, but for those that don't read: their buffers mustn't grow."""
        for gateway in self._gateways.values():
            if not gateway.paused:
                gateway.send_bytes(data)

    def _tell_load(self) -> None:
        self._told = self._ping()
        self._broadcast(encode(self._told))

    def _ping(self) -> Frame:
        return {"t": "ping", "load": self.load(), "floods": self.report.floods}

    async def _tick(self) -> None:
        """Pings gateways and drops silent ones."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_EVERY_S)
            now = loop.time()
            self._tell_load()
            for gateway in list(self._gateways.values()):
                if now - gateway.heard > DEAD_AFTER_S:
                    gateway.close(f"nothing heard for {DEAD_AFTER_S:g} s")

    async def _watch_ranks(self) -> None:
        """Fails the group when a rank hangs. Loading a model and warming up may take any time."""
        watch = RankWatch(self.config.beat_timeout_s, self.config.step_timeout_s)
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if self.ready and not self._closing:
                wrong = watch.look(asyncio.get_running_loop().time(), self._ranks)
                if wrong is not None:
                    self.fail(wrong)


def _unreadable(request: Mapping[str, Any]) -> tuple[ErrorCode, str] | None:
    try:
        GenerationRequest.from_wire(request)
    except ValueError as e:
        return "bad_request", f"the request can't be read: {e}"
    return None
