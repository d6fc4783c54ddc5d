"""Requests whose answers are known, for benchmarks/failover.py: sent on and on, each compared."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from _sse import chunks

TIMEOUT_S = 120.0
FIRM = 0.9  # of the requests, whose answers must not depend on the batch
OPENINGS = ("The day was", "In the beginning", "Tell me", "A ship", "My son,", "Once")


@dataclass(frozen=True)
class Job:
    """One request, the same each time that it is sent."""

    key: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a caller sees of an answer, streamed or not."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Outcome:
    """One request that was sent under load."""

    began: float
    ended: float
    verdict: str  # "equal", "altered", or why there is no answer


@dataclass
class Tally:
    """What came of all requests."""

    outcomes: list[Outcome] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)  # of what went wrong

    def count(self) -> dict[str, int]:
        return dict(Counter(o.verdict for o in self.outcomes))

    def slowest_s(self) -> float:
        return max((o.ended - o.began for o in self.outcomes), default=0.0)


def make_jobs(facts: dict[str, Any], base: str, count: int, rng: random.Random) -> list[Job]:
    """Base and all adapters in turn; greedy and sampled, streamed and whole, of many lengths."""
    owners = [(t["key"], name) for t in facts["tenants"] for name in t["adapters"]]
    models = [(facts["tenants"][0]["key"], base), *owners]
    jobs = []
    for i in range(count):
        key, model = models[i % len(models)]
        body: dict[str, Any] = {
            "model": model,
            "prompt": f"{rng.randrange(10**6)} {rng.choice(OPENINGS)}",
            "max_tokens": rng.randrange(24, 160),
            "ignore_eos": True,
            "seed": rng.randrange(2**31),
        }
        body |= {"temperature": 0.0} if i % 2 else {"temperature": 0.8, "top_k": 20}
        if rng.random() < 0.6:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        jobs.append(Job(key, body))
    return jobs


class Load:
    """Sends jobs to a service."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=TIMEOUT_S, trust_env=False
        )

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def answers(self, jobs: Sequence[Job], at_once: int) -> tuple[list[Answer], float]:
        """All jobs, `at_once` at a time; their answers and the requests per second."""
        began = time.monotonic()
        room = asyncio.Semaphore(at_once)

        async def ask(job: Job) -> Answer:
            async with room:
                return await self.ask(job)

        answers = await asyncio.gather(*(ask(job) for job in jobs))
        return list(answers), len(jobs) / (time.monotonic() - began)

    async def firm_answers(self, jobs: Sequence[Job]) -> tuple[list[Job], list[Answer], float]:
        """Asks all jobs alone and beside others, and leaves out those whose answers differ then.

        Returns:
            The other jobs, their answers, and requests per second with all jobs at once.

        Raises:
            ValueError: too many are left out.
        """
        expected, capacity = await self.answers(jobs, len(jobs))
        others = [(await self.answers(jobs, at_once))[0] for at_once in (len(jobs), 8, 2)]
        firm = [i for i, a in enumerate(expected) if all(answers[i] == a for answers in others)]
        if len(firm) < FIRM * len(jobs):
            raise ValueError(f"only {len(firm)} of {len(jobs)} answers are always the same")
        return [jobs[i] for i in firm], [expected[i] for i in firm], capacity

    async def ask(self, job: Job) -> Answer:
        """Raises httpx.HTTPError, or ValueError for a stream that ends before its end."""
        headers = {"authorization": f"Bearer {job.key}"}
        if not job.body.get("stream"):
            response = await self._client.post("/v1/completions", headers=headers, json=job.body)
            if response.is_error:
                raise ValueError(f"status {response.status_code}: {response.text[:200]}")
            body = response.json()
            [choice], usage = body["choices"], body["usage"]
            return _answer(choice["text"], choice["finish_reason"], usage)
        text, finish_reason, usage = "", "", None
        async with self._client.stream(
            "POST", "/v1/completions", headers=headers, json=job.body
        ) as response:
            if response.is_error:
                said = (await response.aread()).decode(errors="replace")
                raise ValueError(f"status {response.status_code}: {said[:200]}")
            async for chunk in chunks(response):
                for choice in chunk["choices"]:
                    text += choice["text"]
                    finish_reason = choice["finish_reason"] or finish_reason
                usage = chunk.get("usage") or usage
        if usage is None:
            raise ValueError(f"a stream of {len(text)} characters without its usage")
        return _answer(text, finish_reason, usage)

    async def run(
        self,
        jobs: Sequence[Job],
        expected: Sequence[Answer],
        per_second: float,
        stop: asyncio.Event,
        rng: random.Random,
    ) -> Tally:
        """Poisson arrivals until `stop`; then waits for those that are open."""
        tally = Tally()
        open_: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not stop.is_set():
            due += rng.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            i = rng.randrange(len(jobs))
            task = asyncio.create_task(self._compare(jobs[i], expected[i], tally))
            open_.add(task)
            task.add_done_callback(open_.discard)
        await asyncio.gather(*open_)
        return tally

    async def keep(
        self,
        jobs: Sequence[Job],
        expected: Sequence[Answer],
        clients: int,
        stop: asyncio.Event,
        rng: random.Random,
        tally: Tally,
    ) -> None:
        """So many clients, who ask again as soon as they are answered, until `stop`."""

        async def client() -> None:
            while not stop.is_set():
                i = rng.randrange(len(jobs))
                await self._compare(jobs[i], expected[i], tally)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _compare(self, job: Job, expected: Answer, tally: Tally) -> None:
        began = time.monotonic()
        try:
            answer = await self.ask(job)
            verdict = "equal" if answer == expected else "altered"
            said = "" if verdict == "equal" else f"altered: {job.body}: {expected} -> {answer}"
        except (httpx.HTTPError, ValueError, KeyError) as e:
            verdict, said = "failed", f"{type(e).__name__}: {e}"
        tally.outcomes.append(Outcome(began, time.monotonic(), verdict))
        if said and len(tally.examples) < 10:
            tally.examples.append(said[:600])


def _answer(text: str, finish_reason: str, usage: dict[str, Any]) -> Answer:
    return Answer(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
