"""A request on its way through a simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from .trace import TracedRequest


@dataclass(eq=False)
class Run:
    """`done`: output tokens so far, over all groups that worked on it."""

    request: TracedRequest
    number: int
    done: int = 0
    first_token_s: float | None = None
    prefill_left: int = 0
    holds_adapter: bool = False
    begun_at: int = 0  # the group's step count when it began to decode
    groups: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """KV that it takes at most."""
        return self.request.prompt_tokens + self.request.output_tokens

    @property
    def owner(self) -> tuple[str, str | None]:
        """Tenant and adapter."""
        return self.request.tenant, self.request.adapter
