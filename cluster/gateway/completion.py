"""What chat and text completions share: from a checked request to work that is ready to run."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request

from ...workers import GenerationRequest, TokenLogprob
from ..errors import ApiError
from ..logs import add_log_fields
from .admission import OPEN_END_TOKENS, Reservation, reserve
from .assembler import TokenText
from .auth import Caller
from .deps import GatewayDeps
from .generation import ChoiceEvent, Job, Usage
from .resolve import Target
from .sampling import Plan
from .structured import check

LONG_TEXT_CHARS = 8192  # longer prompts are tokenized in a thread
# Of one prompt, with their alternatives: reading and writing so many takes half a second of the
# event loop that all streams share.
MAX_PROMPT_LOGPROBS = 100_000


class Shape(Protocol):
    """How one API spells its answers."""

    full_object: str
    chunk_object: str
    id_prefix: str
    prompt_field: str

    def opening(self, job: Job) -> dict[str, Any] | None:
        """The first choice entry of a streamed choice, if the API has one."""
        ...

    def piece(self, event: ChoiceEvent, first: bool) -> dict[str, Any] | None:
        """A streamed choice entry; None: nothing to say yet."""
        ...

    def whole(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        """A finished choice."""
        ...

    def beside(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        """Fields beside the choices of a whole answer, from the first choice's events."""
        ...


@dataclass
class Work:
    """One HTTP request that is ready to run."""

    caller: Caller
    target: Target
    plan: Plan
    jobs: list[Job]
    usage: Usage
    reservation: Reservation
    shape: Shape
    stream: bool
    include_usage: bool
    request_id: str
    started: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        return {**self.reservation.headers, "x-loraplex-adapter": self.target.label}

    def extension(self) -> dict[str, Any]:
        """The `loraplex` field of answers."""
        adapter = self.target.adapter
        return {
            "adapter": adapter.digest if adapter else None,
            "version": self.target.version,
            "tier": self.usage.tier,
        }


async def encode(
    deps: GatewayDeps, text: str, param: str, *, add_special_tokens: bool
) -> list[int]:
    """Raises ApiError 400 for text that isn't Unicode, or that can't fit the context."""
    most_chars = deps.tokenizer.chars_per_token
    if most_chars is not None and len(text) > deps.max_context * most_chars:
        raise too_long(deps, f"{len(text)} characters, which are more tokens than that", param)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ApiError(
            400, "invalid_value", f"{param} holds half of a surrogate pair", param=param
        ) from None
    if len(text) <= LONG_TEXT_CHARS:
        return deps.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await deps.compute(deps.tokenizer.encode, text, add_special_tokens=add_special_tokens)


async def prepare(
    deps: GatewayDeps,
    request: Request,
    target: Target,
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
) -> Work:
    """Checks lengths and the grammar, reserves budget, and lays out the choices.

    Raises:
        ApiError: 400 context_length_exceeded or invalid_grammar, 429.
    """
    caller: Caller = request.state.caller
    add_log_fields(digest=target.label)
    jobs: list[Job] = []
    estimate = 0
    for prompt_index, prompt in enumerate(prompts):
        room = _room(deps, plan, len(prompt), shape.prompt_field)
        if plan.sampling.min_tokens > room:
            raise ApiError(
                400,
                "invalid_value",
                f"min_tokens is {plan.sampling.min_tokens}, but after the prompt there is room "
                f"for {room} tokens",
                param="min_tokens",
            )
        _check_prompt_logprobs(plan, len(prompt))
        expected = room if plan.max_tokens is not None else min(room, OPEN_END_TOKENS)
        estimate += len(prompt) + plan.n * expected
        for k in range(plan.n):
            jobs.append(
                Job(
                    index=len(jobs),
                    prompt_index=prompt_index,
                    request=GenerationRequest(
                        # Never the client's own id: streams of a connection are told apart by it.
                        request_id=f"{request.state.request_id}.{secrets.token_hex(8)}",
                        prompt_ids=tuple(prompt),
                        sampling=plan.for_choice(room, k),
                        tenant_id=caller.tenant_id,
                        adapter=target.adapter,
                        weight=caller.weight,
                        priority=plan.priority,
                        timeout_s=plan.queue_timeout_s,
                        traceparent=request.state.traceparent,
                    ),
                )
            )
    await check(deps, plan.sampling.grammar, plan.grammar_param)
    reservation = await reserve(deps, caller, estimate)
    return Work(
        caller=caller,
        target=target,
        plan=plan,
        jobs=jobs,
        usage=Usage(prompt_tokens=sum(len(prompt) for prompt in prompts)),
        reservation=reservation,
        shape=shape,
        stream=stream,
        include_usage=include_usage,
        request_id=f"{shape.id_prefix}-{uuid.uuid4().hex}",
    )


def _room(deps: GatewayDeps, plan: Plan, prompt_tokens: int, param: str) -> int:
    """Tokens that may be generated. Raises ApiError 400 when they don't fit."""
    limit = deps.max_context
    if prompt_tokens == 0:
        raise ApiError(
            400, "invalid_value", "the prompt is empty; it needs at least one token", param=param
        )
    # A group always generates one token, also for a prompt that is only scored.
    wanted = 1 if plan.score_only else plan.max_tokens
    rest = limit - prompt_tokens
    if rest >= (wanted or 1):
        return wanted or rest
    asked = f" and {wanted} for the answer" if wanted else ""
    raise too_long(deps, f"{prompt_tokens}{asked}", param)


def _check_prompt_logprobs(plan: Plan, prompt_tokens: int) -> None:
    top = plan.sampling.prompt_logprobs
    if top is not None and prompt_tokens * (1 + top) > MAX_PROMPT_LOGPROBS:
        param = "logprobs" if plan.prompt_top is None else "prompt_logprobs"
        raise ApiError(
            400,
            "invalid_value",
            f"{param}: {top} alternatives of {prompt_tokens} prompt tokens are asked for; tokens "
            f"and alternatives together may be {MAX_PROMPT_LOGPROBS}",
            param=param,
        )


def too_long(deps: GatewayDeps, size: str, param: str) -> ApiError:
    return ApiError(
        400,
        "context_length_exceeded",
        f"this model's maximum context length is {deps.max_context} tokens, but the prompt has "
        f"{size}; shorten the prompt or lower max_tokens",
        param=param,
    )


def join(events: Sequence[ChoiceEvent]) -> tuple[str, list[TokenText], str | None]:
    """A choice's text, tokens and finish reason."""
    text = "".join(item.delta.text for item in events)
    tokens = [token for item in events for token in item.delta.tokens]
    return text, tokens, events[-1].delta.finish_reason if events else None


def find_prompt_logprobs(events: Sequence[ChoiceEvent]) -> list[TokenLogprob | None] | None:
    """Those of a choice's prompt, which come with its first output if they were asked for."""
    return next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None)
