"""Sends requests to worker groups, and carries them on at another group when theirs fails."""

from __future__ import annotations

import asyncio
import logging
import math
import zlib
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..workers import ErrorCode, GenerationRequest, TokenOutput
from .connection import GroupConnection, GroupLost, GroupStream
from .control.table import GroupEntry, RoutingTable
from .prefix_record import PrefixRecord
from .routing import Ask, GroupLoad

log = logging.getLogger(__name__)

# since (epoch, version) -> the table's wire form, None when it hasn't changed
TableSource = Callable[[tuple[int, int]], Awaitable[dict[str, Any] | None]]
Choose = Callable[[RoutingTable, Ask, Mapping[str, GroupLoad], AbstractSet[str]], GroupEntry | None]
Event = Literal["continuation", "refused", "no_group"]

_HASHED_TOKENS = 256
_WAIT_STEP_S = 0.05
_TABLE_TIMEOUT_S = 5.0
_FULL_S = 0.5  # before a group that had no room for a continuation is asked again
# The group lives, but not for this request: another one may take it, and nothing was lost.
_REFUSALS = frozenset({"overloaded", "draining"})


@dataclass(frozen=True)
class DispatchLimits:
    """
    Args:
        max_continuations: how often a request goes on elsewhere after its group failed.
        max_engine_failures: the same after an exception in the engine. It is lower because the
            request itself may be the cause, and would fail one group after the other.
        patience_s: how long a new request waits for a group when none is connected.
        continuation_patience_s: the same for one whose group failed; about what a group's
            restart takes, since its tokens would be lost otherwise.
        poll_s: how often the table is pulled.
    """

    max_continuations: int = 3
    max_engine_failures: int = 1
    patience_s: float = 5.0
    continuation_patience_s: float = 20.0
    poll_s: float = 0.5


class Dispatcher:
    """A gateway's way to the groups. All methods belong to the event loop that called `start`.

    Args:
        table_source: the controller's table; may raise or hang, the last table serves on.
        secret: the cluster secret.
        choose: picks a group (`cluster.routing.choose`).
        on_event: told (event, group) for metrics; the group is "" where there is none.
    """

    def __init__(
        self,
        table_source: TableSource,
        secret: bytes,
        choose: Choose,
        limits: DispatchLimits | None = None,
        on_event: Callable[[Event, str], None] = lambda event, group: None,
    ):
        self._source = table_source
        self._secret = secret
        self._choose = choose
        self._limits = limits or DispatchLimits()
        self._on_event = on_event
        self._table = RoutingTable()
        self._connections: dict[str, GroupConnection] = {}
        self._prefixes = PrefixRecord()
        self._missed = False  # the last pull failed
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Pulls the table once, then keeps pulling it in the background."""
        await self._pull()
        self._task = asyncio.get_running_loop().create_task(self._poll())

    async def close(self) -> None:
        """Ends every connection; open requests end with an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(*(c.close() for c in connections))

    @property
    def table(self) -> RoutingTable:
        """The newest table that came."""
        return self._table

    def ready(self) -> bool:
        """Some group would take a request now."""
        return any(c.connected and not c.draining for c in self._connections.values())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """The outputs of a request; the last one has a `finish_reason`.

        When the group fails, the request goes on at another one from the tokens that came, which
        are not repeated. Errors are outputs too: those of the group, "group_failed" when there
        were too many failures, "no_group" when no group can be reached. Closing the generator
        (or cancelling its task) ends the work on the group.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        progress = _Progress(request)
        refused: set[str] = set()
        full: set[str] = set()  # a moment ago
        failures = engine_failures = 0
        patience_s = self._limits.patience_s
        give_up = began  # when to stop asking full groups
        error = _error(request, "no_group", "no worker group can be reached; try again later")
        while True:
            left_s = progress.left_s(loop.time() - began)
            connection = await self._pick(request, refused | full, min(patience_s, left_s))
            left_s = progress.left_s(loop.time() - began)
            if left_s <= 0:
                yield _error(request, "deadline_exceeded", _LATE.format(request.timeout_s))
                return
            if connection is None and full and progress.begun and loop.time() < give_up:
                full.clear()
                continue
            if connection is None:
                self._on_event("no_group", "")
                yield error
                return
            stream: GroupStream | None = None
            try:
                stream = connection.open(progress.request(left_s))
                while True:
                    output = await stream.next()
                    if output.error_code in _RETRIED:
                        break
                    progress.note(output)
                    yield output
                    if output.finish_reason is not None or output.error_code is not None:
                        return
            except GroupLost as e:
                output = _error(request, "group_failed", str(e))
            finally:
                if stream is not None:
                    stream.close()
            error = output
            if error.error_code in _REFUSALS:
                self._on_event("refused", connection.group)
                if error.error_code == "overloaded":
                    full.add(connection.group)
                    # The caller is to slow down, unless another group has room; but what has begun
                    # waits for some, since its tokens would be lost.
                    patience_s = _FULL_S if progress.begun else 0.0
                else:
                    refused.add(connection.group)
                continue
            log.warning(
                "request %s: group %s failed after %d tokens: %s",
                request.request_id,
                connection.group,
                progress.count,
                error.error,
            )
            failures += 1
            engine_failures += error.error_code == "engine_failed"
            if connection.connected:
                refused.add(connection.group)  # its front answers, but its ranks are gone
            if progress.complete:
                # The group was lost between the last token and the word that it was the last.
                yield TokenOutput(request.request_id, finish_reason="length")
                return
            if (
                failures > self._limits.max_continuations
                or engine_failures > self._limits.max_engine_failures
            ):
                yield error
                return
            full.clear()
            patience_s = self._limits.continuation_patience_s
            give_up = loop.time() + patience_s
            self._on_event("continuation", connection.group)

    async def _pick(
        self, request: GenerationRequest, refused: set[str], patience_s: float
    ) -> GroupConnection | None:
        """The connection to use; None when none came up within `patience_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        key = request.adapter.key if request.adapter else None
        prompt_hash = _prompt_hash(request.prompt_ids)
        blocks = self._prefixes.blocks(key or f"{request.tenant_id}/base", request.prompt_ids)
        tokens = len(request.prompt_ids) + len(request.output_ids)
        while True:
            usable = {
                name: c
                for name, c in self._connections.items()
                if c.connected and not c.draining and name not in refused
            }
            loads = {name: c.load for name, c in usable.items()}
            exclude = {e.group for e in self._table.groups if e.group not in usable}
            cached = self._prefixes.cached(blocks)
            ask = Ask(key, prompt_hash, tokens, cached, request.tenant_id)
            entry = self._choose(self._table, ask, loads, exclude)
            if entry is not None:
                self._prefixes.note(blocks, entry.group)
                return usable[entry.group]
            if loop.time() >= deadline:
                return None
            await asyncio.sleep(_WAIT_STEP_S)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._limits.poll_s)
            await self._pull()

    async def _pull(self) -> None:
        since = (self._table.epoch, self._table.version)
        try:
            async with asyncio.timeout(_TABLE_TIMEOUT_S):
                wire = await self._source(since)
            table = RoutingTable.from_wire(wire) if wire is not None else self._table
            self._missed = False
        except Exception as e:
            # Whatever is wrong with the controller, the last table serves on.
            if not self._missed:
                log.warning("no routing table from the controller, the last one is used: %r", e)
            self._missed = True
            table = self._table
        if (table.epoch, table.version) > since and (table.groups or not self.ready()):
            # A controller that has just started knows no groups yet, while ours still answer.
            self._table = table
        await self._connect()

    async def _connect(self) -> None:
        """Makes the connections match the table; one with open streams stays until they end."""
        wanted = {e.group: e for e in self._table.groups}
        for name, connection in list(self._connections.items()):
            entry = wanted.get(name)
            gone = entry is None or (entry.host, entry.port) != connection.address
            if gone and not connection.streams:
                del self._connections[name]
                self._prefixes.forget(name)
                await connection.close()
        for name, entry in wanted.items():
            if name not in self._connections:
                connection = GroupConnection(name, entry.host, entry.port, self._secret)
                self._connections[name] = connection
                connection.start()


_LATE = "no worker group was found within the request's queue_timeout of {:g} s; try again later"
_RETRIED = _REFUSALS | {"group_failed", "engine_failed"}


class _Progress:
    """What a request has got so far, from all groups that worked on it."""

    def __init__(self, request: GenerationRequest):
        self._request = request
        self._tokens = list(request.output_ids)
        self.begun = False
        self._continued = False

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def complete(self) -> bool:
        return self.count >= self._request.sampling.max_tokens

    def note(self, output: TokenOutput) -> None:
        """Takes an output on its way to the caller; hides what a continuation says again."""
        if self._continued:
            output.tier = None
            output.prompt_logprobs = None
            output.cached_tokens = 0
        self.begun = True
        self._tokens += output.token_ids

    def left_s(self, waited_s: float) -> float:
        """Until it has to be begun, so long after it came."""
        timeout_s = self._request.timeout_s
        return math.inf if timeout_s is None or self.begun else timeout_s - waited_s

    def request(self, left_s: float) -> GenerationRequest:
        """The request to send now, to be begun within `left_s`."""
        if not self.begun:
            timeout_s = None if math.isinf(left_s) else left_s
            return replace(self._request, timeout_s=timeout_s)
        self._continued = True
        # Prompt logprobs came with the first output.
        sampling = replace(self._request.sampling, prompt_logprobs=None)
        return replace(
            self._request, output_ids=tuple(self._tokens), sampling=sampling, timeout_s=None
        )


def _prompt_hash(prompt_ids: tuple[int, ...]) -> int:
    """Equal for prompts with equal first tokens, in every process."""
    head = array("q", prompt_ids[:_HASHED_TOKENS]).tobytes()
    return zlib.crc32(head) << 32 | zlib.adler32(head)


def _error(request: GenerationRequest, code: ErrorCode, text: str) -> TokenOutput:
    return TokenOutput(request.request_id, finish_reason="error", error_code=code, error=text)
