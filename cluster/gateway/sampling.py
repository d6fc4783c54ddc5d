"""From a request's fields to `SamplingParams`: bounds, defaults and seeds."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, replace

from ...adapter_store import show
from ...workers import SamplingParams
from ..errors import ApiError
from ..settings import Settings
from .schemas import SEED_BITS, ChatBody, CompletionBody, GenerationBody
from .structured import grammar_of

_SEED_MASK = (1 << SEED_BITS) - 1
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300  # entries, as OpenAI allows


@dataclass(frozen=True)
class Plan:
    """How one request generates, apart from its prompts.

    Attributes:
        sampling: everything but `max_tokens` and `seed`, which differ by prompt and choice.
        max_tokens: as the client gave it; None: not given.
        seed: of the first choice.
        n: choices for each prompt.
        stops: stop strings.
        top: alternatives shown beside each token; None: no logprobs.
        prompt_top: the same for the prompt's tokens in `prompt_logprobs`.
        echo: the prompt's text comes first in the answer.
        score_only: nothing is generated, the prompt alone is answered (max_tokens 0).
        grammar_param: the request's field that gave `sampling.grammar`.
        priority: among the tenant's requests, lower goes first.
        queue_timeout_s: seconds until it has to be begun; None: whenever.
    """

    sampling: SamplingParams
    max_tokens: int | None
    seed: int
    n: int
    stops: tuple[str, ...]
    top: int | None
    prompt_top: int | None = None
    echo: bool = False
    score_only: bool = False
    skip_special_tokens: bool = True
    grammar_param: str = ""
    priority: int = 0
    queue_timeout_s: float | None = None

    def for_choice(self, max_tokens: int, index: int) -> SamplingParams:
        return replace(self.sampling, max_tokens=max_tokens, seed=choice_seed(self.seed, index))


def choice_seed(seed: int, index: int) -> int:
    """The seed of the index-th choice: the request's own for the first, then unrelated ones."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & _SEED_MASK


def plan_chat(body: ChatBody, settings: Settings, vocab_size: int) -> Plan:
    """Raises ApiError 400 for values out of bounds."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400,
            "invalid_value",
            "max_tokens and max_completion_tokens are the same; give one of them",
            param="max_tokens",
        )
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens == 0 or body.max_tokens == 0:
        raise ApiError(
            400, "invalid_value", "max_tokens is 0; it must be at least 1", param="max_tokens"
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "invalid_value", "top_logprobs needs logprobs: true", param="top_logprobs"
        )
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _plan(body, settings, vocab_size, max_tokens, top, "top_logprobs")


def plan_completion(body: CompletionBody, settings: Settings, vocab_size: int) -> Plan:
    """Raises ApiError 400 for values out of bounds."""
    max_tokens = settings.default_max_tokens if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    if max_tokens == 0 and not echo:
        raise ApiError(
            400,
            "invalid_value",
            "max_tokens is 0; it must be at least 1, unless echo is true",
            param="max_tokens",
        )
    plan = _plan(body, settings, vocab_size, max_tokens, body.logprobs, "logprobs")
    if echo and plan.top is not None:
        most = max(plan.top, plan.prompt_top or 0)
        plan = replace(plan, sampling=replace(plan.sampling, prompt_logprobs=most))
    return replace(plan, echo=echo, score_only=max_tokens == 0)


def _plan(
    body: GenerationBody,
    settings: Settings,
    vocab_size: int,
    max_tokens: int | None,
    top: int | None,
    top_name: str,
) -> Plan:
    body.refuse_unsupported()
    _at_most("n", body.n, settings.max_choices)
    _at_most(top_name, top, settings.max_logprobs)
    stops = body.stop_strings
    _at_most("stop", len(stops), settings.max_stop_strings, "strings")
    for stop in stops:
        if not stop:
            raise ApiError(400, "invalid_value", "a stop string is empty", param="stop")
        _at_most("stop", len(stop), settings.max_stop_chars, "characters")
    stop_ids = body.stop_token_ids or []
    _at_most("stop_token_ids", len(stop_ids), MAX_STOP_TOKEN_IDS, "ids")
    check_token_ids(stop_ids, vocab_size, "stop_token_ids")
    _at_most("prompt_logprobs", body.prompt_logprobs, settings.max_logprobs)
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(
            400,
            "invalid_value",
            "prompt_logprobs aren't part of streams; leave out one of prompt_logprobs and stream",
            param="prompt_logprobs",
        )
    grammar, grammar_param = grammar_of(
        body.response_format, body.structured_outputs, settings.max_grammar_bytes
    )
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(
            400,
            "invalid_value",
            f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}",
            param="min_tokens",
        )
    return Plan(
        sampling=SamplingParams(
            min_tokens=min_tokens,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            top_k=min(max(body.top_k or 0, 0), vocab_size),
            min_p=float(body.min_p or 0),
            repetition_penalty=float(body.repetition_penalty or 1),
            presence_penalty=float(body.presence_penalty or 0),
            frequency_penalty=float(body.frequency_penalty or 0),
            logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
            logprobs=top,
            prompt_logprobs=body.prompt_logprobs,
            stop_token_ids=tuple(stop_ids),
            ignore_eos=bool(body.ignore_eos),
            grammar=grammar,
        ),
        max_tokens=max_tokens,
        # Drawn here, so that a request that moves to another group draws the same tokens again.
        seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed & _SEED_MASK,
        n=body.n or 1,
        stops=stops,
        top=top,
        prompt_top=body.prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens is not False,
        grammar_param=grammar_param,
        priority=body.priority or 0,
        queue_timeout_s=body.queue_timeout,
    )


def _logit_bias(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    _at_most("logit_bias", len(given), MAX_LOGIT_BIAS, "entries")
    for name in given:
        # int() would take " 5", "5_0" and digits of other scripts, and two names of one id.
        if not (name.isascii() and name.isdigit() and name == str(int(name[:12]))):
            raise ApiError(
                400,
                "invalid_value",
                f"logit_bias has the key {show(name)}; keys are token ids",
                param="logit_bias",
            )
    ids = [int(name) for name in given]
    check_token_ids(ids, vocab_size, "logit_bias")
    return tuple((i, float(value)) for i, value in zip(ids, given.values(), strict=True) if value)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 when an id isn't one of the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ApiError(
                400,
                "invalid_value",
                f"{param} holds {token_id}; token ids are 0 to {vocab_size - 1}",
                param=param,
            )


def _at_most(name: str, value: int | None, limit: int, unit: str = "") -> None:
    if value is not None and value > limit:
        what = f"{value} {unit}".strip()
        raise ApiError(
            400, "invalid_value", f"{name}: {what} given, at most {limit} are allowed", param=name
        )
