"""Runs the choices of one HTTP request side by side and merges what they produce."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ...workers import ErrorCode, GenerationRequest, TokenLogprob
from ..errors import ApiError, ClusterError
from .assembler import ChoiceAssembler, Delta
from .deps import Dispatcher
from .sampling import Plan
from .tokenizer import TextTokenizer

# What a group's error codes mean over HTTP. 4xx: the same request fails again; 503: it may not.
STATUS: dict[ErrorCode, int] = {
    "empty_prompt": 400,
    "invalid_token": 400,
    "context_length_exceeded": 400,
    "invalid_grammar": 400,
    "grammar_failed": 400,
    "response_too_large": 400,
    "adapter_too_large": 400,
    "client_too_slow": 408,
    "nonfinite_logits": 422,  # the adapter's weights overflow, as refused uploads are 422
    # The gateway checks ids and types: what a group can't read is a fault of this code.
    "bad_request": 500,
    "duplicate_request": 500,
    "adapter_load_failed": 503,
    "engine_failed": 503,
    "group_failed": 503,
    "no_group": 503,
    "overloaded": 503,
    "draining": 503,
    "deadline_exceeded": 504,
}
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Job:
    """One choice: which prompt it answers, and the request that is sent to a group."""

    index: int
    prompt_index: int
    request: GenerationRequest


@dataclass
class ChoiceEvent:
    """What happened to one choice."""

    job: Job
    delta: Delta
    tokens: int = 0  # generated, whether or not they show in the delta
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass
class Usage:
    """Tokens of one HTTP request. A prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    tier: str | None = None
    began: bool = False  # a group has begun with it
    _cached: dict[int, int] = field(default_factory=dict)

    def note_cached(self, prompt_index: int, tokens: int) -> None:
        # Later choices find the first one's prompt in the cache: only the first tells of others.
        self._cached.setdefault(prompt_index, tokens)
        self.cached_tokens = sum(self._cached.values())

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def run(
    dispatcher: Dispatcher,
    tokenizer: TextTokenizer,
    plan: Plan,
    jobs: Sequence[Job],
    usage: Usage,
) -> AsyncGenerator[ChoiceEvent, None]:
    """Events of all jobs as they come. `usage` grows with them. Closing it aborts every job.

    Raises:
        ApiError: a group reported an error, or there is no group.
    """
    streams = [_run_one(dispatcher, tokenizer, plan, job, usage) for job in jobs]
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(
    streams: Sequence[AsyncGenerator[ChoiceEvent, None]],
) -> AsyncGenerator[ChoiceEvent, None]:
    queue: asyncio.Queue[ChoiceEvent | BaseException | None] = asyncio.Queue(maxsize=64)

    async def feed(stream: AsyncGenerator[ChoiceEvent, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_one(
    dispatcher: Dispatcher,
    tokenizer: TextTokenizer,
    plan: Plan,
    job: Job,
    usage: Usage,
) -> AsyncGenerator[ChoiceEvent, None]:
    assembler = ChoiceAssembler(tokenizer, plan)
    counted = 0
    first = True
    try:
        async with aclosing(dispatcher.generate(job.request)) as outputs:
            async for output in outputs:
                if output.error_code is not None or output.finish_reason in ("error", "abort"):
                    raise engine_error(output.error_code or "engine_failed", output.error)
                if first:
                    usage.began = True
                    usage.note_cached(job.prompt_index, output.cached_tokens)
                    usage.tier = usage.tier or output.tier
                    first = False
                if plan.score_only:
                    # The engine always generates; this request asked for its prompt alone.
                    yield ChoiceEvent(job, Delta(finish_reason="length"), 0, output.prompt_logprobs)
                    return
                delta = assembler.push(output)
                new = assembler.completion_tokens - counted
                counted += new
                usage.completion_tokens += new
                yield ChoiceEvent(job, delta, new, output.prompt_logprobs)
                if delta.finish_reason is not None:
                    return
    except ClusterError as error:
        if isinstance(error, ApiError):
            raise
        raise engine_error("no_group", str(error)) from error
    raise engine_error("engine_failed", "the worker group ended the answer before its end")


def engine_error(code: ErrorCode, message: str | None) -> ApiError:
    """A group's error as an HTTP one."""
    status = STATUS.get(code, 500)
    return ApiError(
        status,
        code,
        message or "the worker group failed",
        kind="invalid_request_error" if status < 500 else "server_error",
        headers={"retry-after": str(RETRY_AFTER_S)} if status == 503 else None,
    )
