"""The JSON bodies of chat and text completions: OpenAI's fields and a few of vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from ...adapter_store import show
from ..errors import ApiError
from .closed_model import ClosedModel
from .structured import ResponseFormat, StructuredOutputs

# Numbers that JSON clients write as integers are fine ("temperature": 1); strings are not.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
# The first wrong item is told of alone: with an error for each, a body of some megabytes would hold
# up the event loop for many seconds, and take gigabytes.
_OneError = Field(fail_fast=True)
Texts = Annotated[list[StrictStr], _OneError]
Ids = Annotated[list[StrictInt], _OneError]

SEED_BITS = 63
MAX_MESSAGES = 16384  # of one conversation: each costs some microseconds of the event loop
_MAX_NAME_CHARS = 200  # of a field's name in an error

# Fields of OpenAI's API that change nothing about the answer here.
HARMLESS_FIELDS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)

# Features that aren't implemented, with the values that ask for nothing: any other is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None,),  # accepted where it equals n
    "bad_words": (None, []),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class StreamOptions(BaseModel):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against traffic analysis; never sent


class GenerationBody(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: StrictStr = Field(description="an adapter, adapter@version, or the base model")
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = Field(None, ge=0)
    min_tokens: Count | None = Field(None, ge=0)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Count | None = Field(None, ge=-1, description="0 or -1: off")
    min_p: Number | None = Field(None, ge=0, le=1, description="of the likeliest token's share")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Number | None = Field(None, gt=0, le=100, description="1: off")
    logit_bias: Annotated[dict[StrictStr, Bias], _OneError] | None = Field(
        None, description="token id to what is added"
    )
    prompt_logprobs: Count | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    n: Count | None = Field(None, ge=1)
    stop: StrictStr | Texts | None = None
    stop_token_ids: Ids | None = None
    seed: Count | None = None
    ignore_eos: StrictBool | None = False
    priority: Count | None = Field(
        None, ge=-(2**31), lt=2**31, description="among your own requests, lower goes first"
    )
    queue_timeout: Number | None = Field(
        None, gt=0, le=86400, description="seconds; a request that isn't begun by then gets 504"
    )
    skip_special_tokens: StrictBool | None = True

    def refuse_unsupported(self) -> None:
        """Raises ApiError 400 for fields that nobody knows and features that aren't there."""
        for name, value in (self.model_extra or {}).items():
            param = name[:_MAX_NAME_CHARS]
            if name in HARMLESS_FIELDS:
                continue
            if name == "best_of" and value == (self.n or 1):
                continue
            if name not in _NEUTRAL:
                message = f"unknown parameter: {show(name)}"
                raise ApiError(400, "unknown_parameter", message, param=param)
            if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                raise ApiError(
                    400,
                    "unsupported_parameter",
                    f"{show(name)} is not supported by this service; leave it out",
                    param=param,
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _same(value: Any, neutral: Any) -> bool:
    # bool is an int in Python: False must not pass for a penalty of 0.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


class TextPart(ClosedModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """One turn. `content` parts are joined; other parts than text are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], _OneError] | None = None
    name: StrictStr | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """What the chat template sees. Raises ApiError 400."""
        where = f"messages.{index}"
        for field, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                param = f"{where}.{field}"[:_MAX_NAME_CHARS]
                raise ApiError(
                    400,
                    "unsupported_parameter",
                    f"{param} is not supported by this service; leave it out",
                    param=param,
                )
        if self.content is None and self.role != "assistant":
            raise ApiError(
                400,
                "invalid_value",
                f"{where}.content is null; a {self.role} message needs text",
                param=f"{where}.content",
            )
        text = (
            "".join(part.text for part in self.content)
            if isinstance(self.content, list)
            else self.content or ""
        )
        # Templates know OpenAI's newer name for the same role under its older one.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": text}
        return {**message, "name": self.name} if self.name else message


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Count | None = Field(None, ge=1)
    logprobs: StrictBool | None = False
    top_logprobs: Count | None = Field(None, ge=0)
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: StrictStr | Texts | Ids | Annotated[list[Ids], _OneError]
    echo: StrictBool | None = False
    logprobs: Count | None = Field(None, ge=0)
    add_special_tokens: StrictBool = True

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or token ids. Raises ApiError 400 for none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "invalid_value", "prompt is an empty list", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
