"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...adapter_store import show
from ..errors import ApiError
from .completion import encode, find_prompt_logprobs, join, prepare
from .deps import GatewayDeps
from .generation import ChoiceEvent, Job
from .logprobs import chat_logprobs, prompt_logprobs
from .resolve import ModelResolver
from .respond import respond
from .sampling import Plan, plan_chat
from .schemas import ChatBody
from .tokenizer import TextTokenizer

_RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class ChatShape:
    """OpenAI's chat.completion and chat.completion.chunk."""

    full_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    def __init__(self, tokenizer: TextTokenizer, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._top, self._prompt_top = plan.top, plan.prompt_top

    def opening(self, job: Job) -> dict[str, Any]:
        return {
            "index": job.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def piece(self, event: ChoiceEvent, first: bool) -> dict[str, Any] | None:
        delta = event.delta
        if not delta.text and not delta.tokens and delta.finish_reason is None:
            return None
        return {
            "index": event.job.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.tokens) if delta.tokens else None,
            "finish_reason": delta.finish_reason,
        }

    def whole(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        text, tokens, reason = join(events)
        return {
            "index": events[0].job.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }

    def beside(self, events: Sequence[ChoiceEvent]) -> dict[str, Any]:
        if self._prompt_top is None:
            return {}
        found = find_prompt_logprobs(events) or []
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, found, self._prompt_top)}

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return chat_logprobs(self._tokenizer, tokens, self._top)


def chat_router(deps: GatewayDeps, resolver: ModelResolver) -> APIRouter:
    router = APIRouter(tags=["completions"])

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        target = await resolver.resolve(request.state.caller.tenant_id, body.model)
        plan = plan_chat(body, deps.settings, deps.tokenizer.vocab_size)
        prompt = await encode(deps, _render(deps, body), "messages", add_special_tokens=False)
        work = await prepare(
            deps,
            request,
            target,
            plan,
            [prompt],
            ChatShape(deps.tokenizer, plan),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )
        return await respond(deps, request, work)

    return router


def _render(deps: GatewayDeps, body: ChatBody) -> str:
    template = deps.tokenizer.template
    if template is None:
        raise ApiError(
            400,
            "no_chat_template",
            f"the model {deps.base_model.name!r} has no chat template; use /v1/completions",
            param="messages",
        )
    variables = body.chat_template_kwargs or {}
    if wrong := sorted(_RESERVED_VARIABLES & variables.keys()):
        raise ApiError(
            400,
            "invalid_value",
            f"chat_template_kwargs must not set {show(wrong[0])}",
            param="chat_template_kwargs",
        )
    messages = [message.for_template(i) for i, message in enumerate(body.messages)]
    return template.render(messages, add_generation_prompt=body.add_generation_prompt, **variables)
