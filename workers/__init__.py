"""One worker group: model, LoRA-aware MoE runner, adapter pool, KV cache, scheduler, engine, ranks.

Names are loaded on first use, so that processes without torch (gateways, the controller, the
command line) can import the request and wire types from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import EngineReport, GroupReport
    from .request import (
        AdapterRef,
        FinishReason,
        GenerationRequest,
        SamplingParams,
        TokenLogprob,
        TokenOutput,
    )

_HOME = {
    "AdapterRef": "request",
    "EngineReport": "report",
    "FinishReason": "request",
    "GenerationRequest": "request",
    "GroupReport": "report",
    "SamplingParams": "request",
    "TokenLogprob": "request",
    "TokenOutput": "request",
}

__all__ = [
    "AdapterRef",
    "EngineReport",
    "FinishReason",
    "GenerationRequest",
    "GroupReport",
    "SamplingParams",
    "TokenLogprob",
    "TokenOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
