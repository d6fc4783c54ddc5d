"""One worker group: model, LoRA-aware MoE runner, adapter pool, KV cache, scheduler, engine, ranks.

Names are loaded on first use, so that processes without torch (gateways, the controller, the
command line) can import the request and wire types from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .channels import FrameProtocol
    from .config import EngineConfig, ModelConfig
    from .engine import Engine
    from .engine_process import EngineLike, LinkAddress, RankProgram, run_rank
    from .errors import (
        AdapterTooLarge,
        GrammarInvalid,
        GroupFailed,
        ModelFilesInvalid,
        ModelUnsupported,
        PoolFull,
        WireAuthError,
        WireError,
        WorkerError,
    )
    from .fair_queue import FairQueue
    from .fairness import Prices, VirtualTokenCounter
    from .front.group_front import FrontConfig, GroupFront
    from .front.traces import RequestTrace
    from .group import GroupRanks, RankPlacement
    from .handshake import ClientHandshake
    from .model_runner import run_follower
    from .pace import Pace
    from .places import Places
    from .pool.packs import PackSource
    from .report import EngineReport, GroupReport
    from .request import (
        AdapterRef,
        ErrorCode,
        FinishReason,
        GenerationRequest,
        Grammar,
        SamplingParams,
        TokenLogprob,
        TokenOutput,
    )
    from .sampling.grammar import check_grammar
    from .turns import Backlog, Waits, expected_waits
    from .wire import DEAD_AFTER_S, HANDSHAKE_TIMEOUT_S, PING_EVERY_S, Frame

_HOME = {
    "AdapterRef": "request",
    "AdapterTooLarge": "errors",
    "Backlog": "turns",
    "ClientHandshake": "handshake",
    "DEAD_AFTER_S": "wire",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineLike": "engine_process",
    "EngineReport": "report",
    "ErrorCode": "request",
    "FairQueue": "fair_queue",
    "FinishReason": "request",
    "Frame": "wire",
    "FrameProtocol": "channels",
    "FrontConfig": "front.group_front",
    "GenerationRequest": "request",
    "Grammar": "request",
    "GrammarInvalid": "errors",
    "GroupFailed": "errors",
    "GroupFront": "front.group_front",
    "GroupRanks": "group",
    "GroupReport": "report",
    "HANDSHAKE_TIMEOUT_S": "wire",
    "LinkAddress": "engine_process",
    "ModelConfig": "config",
    "ModelFilesInvalid": "errors",
    "ModelUnsupported": "errors",
    "PING_EVERY_S": "wire",
    "Pace": "pace",
    "PackSource": "pool.packs",
    "Places": "places",
    "PoolFull": "errors",
    "Prices": "fairness",
    "RankPlacement": "group",
    "RankProgram": "engine_process",
    "RequestTrace": "front.traces",
    "SamplingParams": "request",
    "TokenLogprob": "request",
    "TokenOutput": "request",
    "VirtualTokenCounter": "fairness",
    "Waits": "turns",
    "WireAuthError": "errors",
    "WireError": "errors",
    "WorkerError": "errors",
    "check_grammar": "sampling.grammar",
    "run_follower": "model_runner",
    "expected_waits": "turns",
    "run_rank": "engine_process",
}

__all__ = [
    "DEAD_AFTER_S",
    "HANDSHAKE_TIMEOUT_S",
    "PING_EVERY_S",
    "AdapterRef",
    "AdapterTooLarge",
    "Backlog",
    "ClientHandshake",
    "Engine",
    "EngineConfig",
    "EngineLike",
    "EngineReport",
    "ErrorCode",
    "FairQueue",
    "FinishReason",
    "Frame",
    "FrameProtocol",
    "FrontConfig",
    "GenerationRequest",
    "Grammar",
    "GrammarInvalid",
    "GroupFailed",
    "GroupFront",
    "GroupRanks",
    "GroupReport",
    "LinkAddress",
    "ModelConfig",
    "ModelFilesInvalid",
    "ModelUnsupported",
    "Pace",
    "PackSource",
    "Places",
    "PoolFull",
    "Prices",
    "RankPlacement",
    "RankProgram",
    "RequestTrace",
    "SamplingParams",
    "TokenLogprob",
    "TokenOutput",
    "VirtualTokenCounter",
    "Waits",
    "WireAuthError",
    "WireError",
    "WorkerError",
    "check_grammar",
    "expected_waits",
    "run_follower",
    "run_rank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
