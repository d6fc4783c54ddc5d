"""What benchmarks/gateway.py deploys beside the gateway: an engine without a model, the bare app.

Ray's workers can't import this folder: the module travels to them by value.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from loraplex.cluster.actor_clients import ControlClient
from loraplex.cluster.dispatch import Dispatcher
from loraplex.cluster.routing import choose
from loraplex.workers import (
    AdapterRef,
    EngineReport,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse


class StandInEngine:
    """One token for every open request in each step, without a model: the prompt's, in turn.

    A step takes as many microseconds as the `seed` of the request that came last says: each
    round of the benchmark sets one pace for all of its requests.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[GenerationRequest, int]] = {}  # and tokens that it has got
        self._report = EngineReport(max_running=256, pool_bytes_total=1 << 30)
        self._step_s = 0.0

    def submit(self, request: GenerationRequest) -> None:
        self._step_s = request.sampling.seed / 1e6
        self._open[request.request_id] = request, 0
        if request.adapter is not None:
            self._report.gpu[request.adapter.key] = 1 << 20

    def abort(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._open)

    def step(self) -> list[TokenOutput]:
        if self._step_s:
            time.sleep(self._step_s)
        outputs = []
        for request_id, (request, count) in list(self._open.items()):
            prompt = request.prompt_ids
            output = TokenOutput(request_id, [prompt[count % len(prompt)]])
            if count == 0:
                output.tier = "gpu"
            if count + 1 == request.sampling.max_tokens:
                output.finish_reason = "length"
                del self._open[request_id]
            else:
                self._open[request_id] = request, count + 1
            outputs.append(output)
        return outputs

    def set_desired(self, adapters: list[AdapterRef]) -> None:
        pass

    def purge(self, key: str) -> None:
        self._report.gpu.pop(key, None)

    def report(self) -> EngineReport:
        self._report.running = len(self._open)
        return self._report

    def close(self) -> None:
        self._open.clear()


@dataclass(frozen=True)
class StandInProgram:
    """What the group's one rank runs."""

    def build(self, rendezvous: str) -> StandInEngine:
        return StandInEngine()

    def follow(self, rank: int, rendezvous: str) -> None:
        raise AssertionError("the group has one rank")


@serve.deployment(name="Streamer", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class Streamer:
    """The bare app's second deployment: makes chunks as fast as it is asked to."""

    async def stream(self, chunk: str, count: int, pace_us: int) -> AsyncIterator[str]:
        for _ in range(count):
            if pace_us:
                await asyncio.sleep(pace_us / 1e6)
            yield chunk


@serve.deployment(name="Ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class Ingress:
    """The bare app's front: what Serve's documentation shows for streams, with one handle hop."""

    def __init__(self, streamer: DeploymentHandle, chunk: str):
        self._streamer = streamer.options(stream=True, method_name="stream")
        self._chunk = chunk

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(
            self._events(body["max_tokens"], body["seed"]), media_type="text/event-stream"
        )

    async def _events(self, count: int, pace_us: int) -> AsyncIterator[str]:
        stream: Any = self._streamer.remote(self._chunk, count, pace_us)
        async for chunk in stream:
            yield chunk
        yield "data: [DONE]\n\n"


@serve.deployment(name="HopProbe", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class HopProbe:
    """Both ways from one replica to another's stream, without HTTP before them."""

    def __init__(self, streamer: DeploymentHandle, secret: bytes):
        self._streamer = streamer.options(stream=True, method_name="stream")
        self._dispatcher = Dispatcher(ControlClient().table, secret, choose)
        self._started = False

    async def measure(
        self, way: str, at_once: int, calls: int, tokens: int, pace_us: int
    ) -> tuple[list[float], list[float]]:
        """Seconds of each call, and to its first token.

        Args:
            way: "handle" or "connection".
            at_once: callers; each makes its calls one after another.
            calls: of each caller.
        """
        if not self._started:
            self._started = True
            await self._dispatcher.start()
            while not self._dispatcher.ready():
                await asyncio.sleep(0.05)
        call = self._by_handle if way == "handle" else self._by_connection
        whole, first = [], []

        async def caller() -> None:
            for _ in range(calls):
                got = 0
                began = time.perf_counter()
                async for _ in call(tokens, pace_us):
                    if not got:
                        first.append(time.perf_counter() - began)
                    got += 1
                whole.append(time.perf_counter() - began)
                if got != tokens:
                    raise RuntimeError(f"{way}: {got} chunks came instead of {tokens}")

        await asyncio.gather(*(caller() for _ in range(at_once)))
        return whole, first

    def _by_handle(self, tokens: int, pace_us: int) -> AsyncIterator[Any]:
        stream: Any = self._streamer.remote("token", tokens, pace_us)
        return stream

    def _by_connection(self, tokens: int, pace_us: int) -> AsyncIterator[Any]:
        sampling = SamplingParams(max_tokens=tokens, seed=pace_us)
        request = GenerationRequest(uuid.uuid4().hex, (1, 2, 3), sampling, "bench")
        return self._dispatcher.generate(request)


def bare_app(chunk: str) -> serve.Application:
    return Ingress.bind(Streamer.bind(), chunk)


def probe_app(secret: bytes) -> serve.Application:
    return HopProbe.bind(Streamer.options(name="ProbeStreamer").bind(), secret)
