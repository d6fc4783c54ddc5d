"""Whether an engine can serve a request at all."""

from __future__ import annotations

from .config import EngineConfig
from .request import ErrorCode, GenerationRequest


def wrong_with(request: GenerationRequest, config: EngineConfig) -> tuple[ErrorCode, str] | None:
    """Why a request can't be served: code and message, for its tenant."""
    n, vocab = len(request.prompt_ids), config.model.vocab_size
    if n == 0:
        return "empty_prompt", "the prompt has no tokens"
    bad = [t for t in (*request.prompt_ids, *request.output_ids) if not 0 <= t < vocab]
    if bad:
        return "invalid_token", f"token id {bad[0]} is outside 0..{vocab - 1}"
    if n >= config.context_length:
        return (
            "context_length_exceeded",
            f"the prompt has {n} tokens; at most {config.context_length - 1} fit the context "
            f"of {config.context_length} with one token of output",
        )
    return None
