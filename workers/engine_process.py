"""A rank's process: its link to the group's front and, on rank 0, the engine loop.

Imports no torch itself: the rank's program does, when it builds the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .channels import BlockingChannel
from .errors import WireError
from .rank_watch import BEAT_EVERY_S
from .report import EngineReport
from .request import AdapterRef, GenerationRequest, TokenOutput
from .wire import Frame, encode, encode_batch

REPORT_EVERY_S = 0.5
# A step that had nothing to do (it waits for a load, say) returns at once; without a rest the
# loop would spin on it.
_EMPTY_STEP_S = 0.001
_REST_S = 0.002
# How long a step may still run when the front has gone or has said stop.
_LAST_STEP_S = 10.0
_MAX_ERROR_CHARS = 4000

log = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What the loop drives. One thread builds the engine and makes every call."""

    def submit(self, request: GenerationRequest, /) -> None: ...
    def abort(self, request_id: str, /) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[TokenOutput]: ...
    def set_desired(self, adapters: list[AdapterRef], /) -> None: ...
    def keep_on_host(self, adapters: list[AdapterRef], /) -> None: ...
    def purge(self, key: str, /) -> None: ...
    def report(self) -> EngineReport: ...
    def close(self) -> None: ...


class RankProgram(Protocol):
    """What the ranks of a group run. Picklable; `rendezvous` is "tcp://127.0.0.1:port"."""

    def build(self, rendezvous: str, /) -> EngineLike:
        """Builds the engine; called in rank 0 only."""
        ...

    def follow(self, rank: int, rendezvous: str, /) -> None:
        """Obeys rank 0 until it says stop; called in every other rank."""
        ...


@dataclass(frozen=True)
class LinkAddress:
    """Where the ranks of a group reach their front, and the secret of this group's links."""

    host: str
    port: int
    secret: bytes = field(repr=False)


def adapter_of(key: str) -> AdapterRef:
    """The adapter that `AdapterRef.key` names."""
    tenant, _, digest = key.partition("/")
    return AdapterRef(tenant, digest)


class Inbox:
    """Frames from the front, for the engine's thread."""

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._wake = threading.Condition()
        self._stopping = False

    def put(self, frame: Frame) -> None:
        with self._wake:
            self._frames.append(frame)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def take(self, timeout_s: float) -> list[Frame] | None:
        """The frames that have come; waits for one up to `timeout_s`. None after `stop`."""
        with self._wake:
            if timeout_s > 0 and not self._frames and not self._stopping:
                self._wake.wait(timeout_s)
            if self._stopping:
                return None
            frames = list(self._frames)
            self._frames.clear()
            return frames


class EngineLoop:
    """Drives an engine: empties the inbox, makes one step, sends one message; and again.

    Sleeps while there is no work. `send` takes encoded frames and blocks while the front is
    behind.
    """

    def __init__(self, engine: EngineLike, inbox: Inbox, send: Callable[[bytes], None]):
        self._engine = engine
        self._inbox = inbox
        self._send = send
        self._next_report = 0.0

    def run(self) -> None:
        """Returns after `inbox.stop()`. Whatever the engine raises comes out of here."""
        rest_s = 0.0
        while True:
            idle_s = self._next_report - time.monotonic()
            orders = self._inbox.take(rest_s if self._engine.has_work() else idle_s)
            if orders is None:
                return
            self._apply(orders)
            outputs: list[dict[str, Any]] = []
            rest_s = 0.0
            if self._engine.has_work():
                started = time.monotonic()
                made = self._engine.step()
                if not made and time.monotonic() - started < _EMPTY_STEP_S:
                    rest_s = _REST_S
                outputs = [output.to_wire() for output in made]
            if outputs:
                frames, ended = encode_batch(outputs)
                for data in frames:
                    self._send(data)
                for request_id in ended:
                    self._engine.abort(request_id)
            # A first output that waited for a load tells that residency has changed.
            loaded = any(o.get("tier") in ("host", "disk", "s3") for o in outputs)
            if loaded or time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + REPORT_EVERY_S
                report = self._engine.report().to_wire()
                self._send(encode({"t": "report", "report": report}))

    def _apply(self, frames: Iterable[Frame]) -> None:
        """Tells the engine."""
        for frame in frames:
            kind = frame["t"]
            if kind == "submit":
                # The front has read it once already: only what can be read comes here.
                self._engine.submit(GenerationRequest.from_wire(frame["req"]))
            elif kind == "abort":
                for request_id in frame["ids"]:
                    self._engine.abort(request_id)
            elif kind == "desired":
                self._engine.set_desired([adapter_of(key) for key in frame["keys"]])
            elif kind == "host":
                self._engine.keep_on_host([adapter_of(key) for key in frame["keys"]])
            elif kind == "purge":
                for key in frame["keys"]:
                    self._engine.purge(key)
            else:
                raise WireError(f"the front sent a frame of unknown type {kind!r}")


class _FrontLost(Exception):
    """The front went away while something was sent to it."""


def run_rank(program: RankProgram, rank: int, rendezvous: str, link: LinkAddress) -> int:
    """Runs one rank until its front says stop; the exit code for its process.

    The process must end with that code at once (`os._exit`): after a failure, threads of the
    program may hang in a collective. If the front goes away without a word the process is ended
    from here, so that no rank outlives its group.
    """
    try:
        channel, _ = BlockingChannel.connect(link.host, link.port, link.secret)
        channel.send({"t": "rank", "rank": rank, "pid": os.getpid()})
    except (WireError, OSError) as e:
        log.error("rank %d can't reach its front: %s", rank, e)
        return 1

    def send(data: bytes) -> None:
        try:
            channel.send_bytes(data)
        except OSError as e:
            raise _FrontLost(str(e)) from e

    inbox = Inbox()
    threading.Thread(target=_watch, args=(channel, inbox), name="front-link", daemon=True).start()
    threading.Thread(target=_beat, args=(channel,), name="beat", daemon=True).start()
    try:
        if rank == 0:
            engine = program.build(rendezvous)
            send(encode({"t": "up"}))
            EngineLoop(engine, inbox, send).run()
            engine.close()
        else:
            # The front's "stop" goes to rank 0 too, which tells the followers in its own way.
            send(encode({"t": "up"}))
            program.follow(rank, rendezvous)
    except _FrontLost as e:
        log.error("rank %d has lost its front: %s", rank, e)
        return 1
    except BaseException as e:
        log.error("rank %d failed:\n%s", rank, traceback.format_exc())
        text = f"{type(e).__name__}: {e}"[:_MAX_ERROR_CHARS]
        with contextlib.suppress(OSError, WireError):  # the front sees the link break instead
            channel.send({"t": "failed", "error": text})
        return 1
    return 0


def _beat(channel: BlockingChannel) -> None:
    """Tells the front that this process runs, whatever its engine does."""
    with contextlib.suppress(OSError):  # the front has gone: `_watch` ends the process
        while True:
            channel.send({"t": "beat"})
            time.sleep(BEAT_EVERY_S)


def _watch(channel: BlockingChannel, inbox: Inbox) -> None:
    """Reads the link. When it says stop or ends, the process ends soon after."""
    code = 1
    try:
        while (frame := channel.receive()) is not None:
            if frame["t"] == "stop":
                code = 0
                break
            inbox.put(frame)
    except (WireError, OSError) as e:
        log.error("the link to the front broke: %s", e)
    inbox.stop()
    # The engine ends its step and closes; if it hangs, nobody would wait for it any more.
    time.sleep(_LAST_STEP_S)
    os._exit(code)
