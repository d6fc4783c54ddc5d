"""One worker group: model, LoRA-aware MoE runner, adapter pool, KV cache, scheduler, engine, ranks.

Names are loaded on first use, so that processes without torch (gateways, the controller, the
command line) can import the request and wire types from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_process import EngineLike, LinkAddress, RankProgram, run_rank
    from .errors import GroupFailed, WireAuthError, WireError
    from .front import FrontConfig, GroupFront
    from .report import EngineReport, GroupReport
    from .request import (
        AdapterRef,
        FinishReason,
        GenerationRequest,
        SamplingParams,
        TokenLogprob,
        TokenOutput,
    )
    from .wire import (
        DEAD_AFTER_S,
        HANDSHAKE_TIMEOUT_S,
        PING_EVERY_S,
        ClientHandshake,
        Frame,
        FrameProtocol,
    )

_HOME = {
    "AdapterRef": "request",
    "ClientHandshake": "wire",
    "DEAD_AFTER_S": "wire",
    "EngineLike": "engine_process",
    "EngineReport": "report",
    "FinishReason": "request",
    "Frame": "wire",
    "FrameProtocol": "wire",
    "FrontConfig": "front",
    "GenerationRequest": "request",
    "GroupFailed": "errors",
    "GroupFront": "front",
    "GroupReport": "report",
    "HANDSHAKE_TIMEOUT_S": "wire",
    "LinkAddress": "engine_process",
    "PING_EVERY_S": "wire",
    "RankProgram": "engine_process",
    "SamplingParams": "request",
    "TokenLogprob": "request",
    "TokenOutput": "request",
    "WireAuthError": "errors",
    "WireError": "errors",
    "run_rank": "engine_process",
}

__all__ = [
    "DEAD_AFTER_S",
    "HANDSHAKE_TIMEOUT_S",
    "PING_EVERY_S",
    "AdapterRef",
    "ClientHandshake",
    "EngineLike",
    "EngineReport",
    "FinishReason",
    "Frame",
    "FrameProtocol",
    "FrontConfig",
    "GenerationRequest",
    "GroupFailed",
    "GroupFront",
    "GroupReport",
    "LinkAddress",
    "RankProgram",
    "SamplingParams",
    "TokenLogprob",
    "TokenOutput",
    "WireAuthError",
    "WireError",
    "run_rank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
