"""What a worker group is asked for and what it answers. Imports no torch: gateways use it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .request_check import check_request

FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_schema", "regex", "choice", "grammar"]
# Why a request failed, for programs; stable. What each means over HTTP stands in the gateway.
ErrorCode = Literal[
    # the request
    "bad_request",  # it can't be read
    "duplicate_request",
    "empty_prompt",
    "invalid_token",
    "context_length_exceeded",
    "invalid_grammar",
    # on its way
    "grammar_failed",
    "nonfinite_logits",
    "response_too_large",
    "client_too_slow",
    # its adapter
    "adapter_too_large",
    "adapter_load_failed",
    # its group
    "overloaded",
    "draining",
    "group_failed",
    "engine_failed",
    "no_group",  # the dispatcher found none
]


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version of one tenant; the key of pool, KV and routing state."""

    tenant_id: str
    digest: str  # lowercase hex sha256

    @property
    def key(self) -> str:
        return f"{self.tenant_id}/{self.digest}"


@dataclass(frozen=True)
class Grammar:
    """What the generated text must look like.

    `text` is a JSON schema, a regular expression, a JSON list of strings (one of which is
    generated), or a grammar in Lark's or GBNF's notation.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Limits are checked by the gateway, not here.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters off.
    `repetition_penalty` divides positive logits (and multiplies negative ones) of tokens in
    prompt and output; `frequency_penalty` is subtracted once for each time that a token was
    generated, `presence_penalty` once if it was at all. `logit_bias` holds (token id, what is
    added to its logit). Randomness is a function of (`seed`, position), so a continuation draws
    what the first run would have drawn.
    `logprobs` is the number of alternatives reported beside each chosen token, None for none.
    Stop *strings* belong to the gateway, which holds the text; stop token ids belong here.
    With a `grammar`, `min_tokens` and `ignore_eos` don't keep an answer from ending where the
    grammar allows nothing else.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None

    @property
    def penalised(self) -> bool:
        """Earlier tokens change the likelihood of later ones."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def host_state(self) -> bool:
        """A draw needs the sequence's earlier tokens on the host: penalties and grammars do.

        Such a sequence's next draw can't be prepared before its last one has come back.
        """
        return self.penalised or self.grammar is not None

    def to_wire(self) -> dict[str, Any]:
        msg = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        if self.grammar is not None:
            msg["grammar"] = [self.grammar.kind, self.grammar.text]
        return msg

    @classmethod
    def from_wire(cls, msg: Mapping[str, Any]) -> SamplingParams:
        fields = dict(msg)
        fields["stop_token_ids"] = tuple(fields.get("stop_token_ids", ()))
        fields["logit_bias"] = tuple((int(i), float(v)) for i, v in fields.get("logit_bias", ()))
        if fields.get("grammar") is not None:
            fields["grammar"] = Grammar(*fields["grammar"])
        return cls(**fields)


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate.

    `output_ids` holds tokens that an earlier group generated already (a continuation): they
    count against `max_tokens` and are never sent again.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant_id: str
    adapter: AdapterRef | None = None  # None: the base model
    output_ids: tuple[int, ...] = ()
    traceparent: str | None = None  # W3C trace context; None: nobody traces this request

    @property
    def log_fields(self) -> dict[str, str]:
        """`extra` of log lines: the HTTP request's id, which this one's begins with, and whose."""
        return {
            "request_id": self.request_id.rpartition(".")[0] or self.request_id,
            "tenant": self.tenant_id,
            "digest": self.adapter.digest if self.adapter else "base",
        }

    def to_wire(self) -> dict[str, Any]:
        msg: dict[str, Any] = {
            "id": self.request_id,
            "prompt": list(self.prompt_ids),
            "tenant": self.tenant_id,
            "adapter": self.adapter.digest if self.adapter else None,
            "output": list(self.output_ids),
            "sampling": self.sampling.to_wire(),
        }
        if self.traceparent is not None:
            msg["traceparent"] = self.traceparent
        return msg

    @classmethod
    def from_wire(cls, msg: Mapping[str, Any]) -> GenerationRequest:
        """Raises ValueError for what isn't one; see `request_check`."""
        check_request(msg)
        return cls(
            request_id=msg["id"],
            prompt_ids=tuple(msg["prompt"]),
            sampling=SamplingParams.from_wire(msg["sampling"]),
            tenant_id=msg["tenant"],
            adapter=AdapterRef(msg["tenant"], msg["adapter"]) if msg["adapter"] else None,
            output_ids=tuple(msg["output"]),
            traceparent=msg.get("traceparent"),
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one token, before temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass
class TokenOutput:
    """What one engine step produced for one request.

    `tier` is set on the first output: where the adapter was when the request was admitted.
    `error` says `error_code` in words.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    error_code: ErrorCode | None = None
    error: str | None = None
    tier: str | None = None  # "base" | "gpu" | "host" | "disk" | "s3"
    cached_tokens: int = 0
    spans: dict[str, float] | None = None  # `RequestTimes.spans`, with a traced one's last output

    def to_wire(self) -> dict[str, Any]:
        def lp(x: TokenLogprob | None) -> list[Any] | None:
            return [x.token_id, x.logprob, x.rank, [list(t) for t in x.top]] if x else None

        msg: dict[str, Any] = {"id": self.request_id, "tok": self.token_ids}
        if self.logprobs:
            msg["lp"] = [lp(x) for x in self.logprobs]
        if self.prompt_logprobs is not None:
            msg["plp"] = [lp(x) for x in self.prompt_logprobs]
        for name in ("finish_reason", "error_code", "error", "tier"):
            if getattr(self, name) is not None:
                msg[name] = getattr(self, name)
        if self.cached_tokens:
            msg["cached"] = self.cached_tokens
        if self.spans is not None:
            msg["spans"] = self.spans
        return msg

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> TokenOutput:
        def lp(x: list[Any] | None) -> TokenLogprob | None:
            if x is None:
                return None
            return TokenLogprob(x[0], x[1], x[2], tuple((t[0], t[1]) for t in x[3]))

        return cls(
            request_id=msg["id"],
            token_ids=msg["tok"],
            logprobs=[y for x in msg.get("lp", ()) if (y := lp(x)) is not None],
            prompt_logprobs=[lp(x) for x in msg["plp"]] if "plp" in msg else None,
            finish_reason=msg.get("finish_reason"),
            error_code=msg.get("error_code"),
            error=msg.get("error"),
            tier=msg.get("tier"),
            cached_tokens=msg.get("cached", 0),
            spans=msg.get("spans"),
        )
