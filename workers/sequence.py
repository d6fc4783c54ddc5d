"""A request while an engine works on it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from .host_state import HostState
from .kv_blocks import BlockHash, first_hash, next_hash
from .request import FinishReason, GenerationRequest, TokenLogprob
from .request_times import RequestTimes


@dataclass(eq=False)
class Sequence:
    """Tokens, KV blocks and adapter slot of one request.

    The first `computed` tokens are in the cache, or will be when the launched steps are done; the
    rest still has to go through the model. While a sequence decodes, exactly one token is not
    computed: the newest. `unread` tokens follow those in `tokens`: sampled on the device by a
    launched step, and not known to the host yet.
    """

    request: GenerationRequest
    arrival: int
    limit: int  # tokens (prompt and output) at which it ends for its length
    tokens: list[int] = field(init=False)
    owner: str = field(init=False)  # whose work it is, as reports and the prefix cache name it
    computed: int = 0
    unread: int = 0
    flights: int = 0  # launched steps that name it and whose results weren't read
    removed: bool = False  # ended or aborted; what it holds is freed after its last flight
    purged: bool = False  # its adapter was deleted: nobody may find its blocks again
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks, as far as known
    slot: int | None = None  # None: not admitted; -1: base model
    tier: str | None = None
    started: bool = False  # an output was sent
    cached_tokens: int | None = None  # of the prompt, found when it was admitted first
    rank: int = 0  # of its adapter, known once it is admitted
    paid: int = field(init=False)  # tokens that its tenant was charged for, of `tokens`
    deadline: float | None = None  # by which it is to begin, seconds of the engine's clock
    prompt_logprobs: list[TokenLogprob | None] | None = None
    host: HostState | None = None  # of requests whose sampling says `host_state`
    times: RequestTimes = field(default_factory=RequestTimes)

    def __post_init__(self) -> None:
        self.owner = self.adapter_key or f"{self.request.tenant_id}/base"
        self.tokens = [*self.request.prompt_ids, *self.request.output_ids]
        # A continuation's prompt and outputs were charged by the group that had it before.
        self.paid = len(self.tokens) if self.request.output_ids else 0
        if self.request.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def adapter_key(self) -> str | None:
        return self.request.adapter.key if self.request.adapter else None

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the model."""
        return len(self.tokens) + self.unread - self.computed

    @property
    def length(self) -> int:
        """Tokens so far, with those that are still on the device."""
        return len(self.tokens) + self.unread

    @property
    def ending(self) -> bool:
        """Whether its last token is on the device already: there is nothing more to compute."""
        return self.unread > 0 and self.length >= self.limit

    def finish_reason(self, eos_token_ids: Container[int]) -> FinishReason | None:
        """Why it ends with its newest token; None: it doesn't."""
        token, params = self.tokens[-1], self.request.sampling
        if self.host is not None and self.host.finished:
            return "stop"
        if self.output_count >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop"
            if not params.ignore_eos and token in eos_token_ids:
                return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def block_hashes(self, block_size: int) -> Iterator[BlockHash]:
        """Names of the full blocks of the tokens known so far, each made when it is come to."""
        n = 0
        while (n + 1) * block_size <= len(self.tokens):
            if n == len(self.hashes):
                self._name_next(block_size)
            yield self.hashes[n]
            n += 1

    def extend_hashes(self, block_size: int) -> None:
        """Names every full block of the tokens known so far."""
        while (len(self.hashes) + 1) * block_size <= len(self.tokens):
            self._name_next(block_size)

    def _name_next(self, block_size: int) -> None:
        n = len(self.hashes)
        previous = self.hashes[-1] if n else first_hash(self.request.tenant_id, self.adapter_key)
        block = self.tokens[n * block_size : (n + 1) * block_size]
        self.hashes.append(next_hash(previous, block))
