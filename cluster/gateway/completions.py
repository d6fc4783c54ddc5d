"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import ApiError
from .assembler import TokenText, prompt_tokens
from .completion import encode, find_prompt_logprobs, join, prepare, too_long
from .deps import GatewayDeps
from .generation import ChoiceEvent, Job
from .logprobs import completion_logprobs, prompt_logprobs
from .resolve import ModelResolver
from .respond import respond
from .sampling import Plan, check_token_ids, plan_completion
from .schemas import CompletionBody
from .tokenizer import TextTokenizer


class CompletionShape:
    """OpenAI's text_completion; the echoed prompt is part of a choice's first piece.

    Args:
        echoes: the text of each prompt; empty: no echo.
    """

    full_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl"
    prompt_field = "prompt"

    def __init__(self, tokenizer: TextTokenizer, plan: Plan, echoes: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._top, self._prompt_top = plan.top, plan.prompt_top
        self._echoes = echoes

    def opening(self, job: Job) -> None:
        return None

    def piece(self, event: ChoiceEvent, first: bool) -> dict[str, Any] | None:
        delta = event.delta
        echo = self._echo(event.job) if first else ""
        if not delta.text and not delta.tokens and not echo and delta.finish_reason is None:
            return None
        return {
            "index": event.job.index,
            "text": echo + delta.text,
            "logprobs": self._logprobs(event.job, [event] if first else [], delta.tokens),
            "finish_reason": delta.finish_reason,
        }

    def whole(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        text, tokens, reason = join(events)
        job = events[0].job
        choice = {
            "index": job.index,
            "text": self._echo(job) + text,
            "logprobs": self._logprobs(job, events, tokens),
            "finish_reason": reason,
        }
        if self._prompt_top is not None:
            found = find_prompt_logprobs(events) or []
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, found, self._prompt_top)
        return choice

    def beside(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        return {}

    def _echo(self, job: Job) -> str:
        return self._echoes[job.prompt_index] if self._echoes else ""

    def _logprobs(
        self, job: Job, events: Sequence[ChoiceEvent], tokens: Sequence[TokenText]
    ) -> dict[str, Any] | None:
        if self._top is None:
            return None
        body = completion_logprobs(self._tokenizer, tokens, self._top, len(self._echo(job)))
        prompt = find_prompt_logprobs(events)
        if not self._echoes or prompt is None:
            return body
        ids = job.request.prompt_ids
        echoed = prompt_tokens(self._tokenizer, ids, prompt)
        front = completion_logprobs(self._tokenizer, echoed, self._top)
        return {name: front[name] + body[name] for name in body}


def completions_router(deps: GatewayDeps, resolver: ModelResolver) -> APIRouter:
    router = APIRouter(tags=["completions"])

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(request: Request, body: CompletionBody) -> Response:
        target = await resolver.resolve(request.state.caller.tenant_id, body.model)
        plan = plan_completion(body, deps.settings, deps.tokenizer.vocab_size)
        given = body.prompts()
        sequences = len(given) * plan.n
        if sequences > deps.settings.max_sequences:
            raise ApiError(
                400,
                "invalid_value",
                f"{len(given)} prompts times n = {plan.n} is {sequences} sequences; at most "
                f"{deps.settings.max_sequences} are answered in one request",
                param="prompt",
            )
        prompts = [await _encode(deps, prompt, body.add_special_tokens) for prompt in given]
        echoes = [
            text
            if isinstance(text, str)
            else deps.tokenizer.decode(text, skip_special_tokens=False)
            for text in (given if plan.echo else [])
        ]
        work = await prepare(
            deps,
            request,
            target,
            plan,
            prompts,
            CompletionShape(deps.tokenizer, plan, echoes),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )
        return await respond(deps, request, work)

    return router


async def _encode(deps: GatewayDeps, prompt: str | list[int], special: bool) -> list[int]:
    if isinstance(prompt, str):
        return await encode(deps, prompt, "prompt", add_special_tokens=special)
    if len(prompt) > deps.max_context:  # a body has room for millions, to be checked and echoed
        raise too_long(deps, str(len(prompt)), "prompt")
    check_token_ids(prompt, deps.tokenizer.vocab_size, "prompt")
    return prompt
