"""What a worker group tells the controller about itself. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

REPORTED_TENANTS = 50


@dataclass
class EngineReport:
    """A snapshot of one engine. Counters only grow while the process lives; sizes are bytes.
    Counts of a deleted adapter go after the report that has all of them.

    Adapters are named by `AdapterRef.key` ("tenant/digest"); base-model work of a tenant is
    counted under "tenant/base".
    """

    weights_bytes: int = 0  # of the model, read by rank 0
    weights_seconds: float = 0.0
    ready_seconds: float = 0.0  # from rank 0's start to the end of its warm-up
    queued: int = 0
    running: int = 0
    max_running: int = 0  # sequences decoded together
    steps: int = 0
    step_seconds: float = 0.0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    preemptions: int = 0
    pool_bytes_total: int = 0
    pool_bytes_used: int = 0
    host_bytes_total: int = 0  # of the node's tier in memory; 0: it has none
    prompt_tokens_pending: int = 0  # of waiting and begun prompts, not computed yet
    end_s: float = 0.0  # from one request's end to the next, while steps run
    # Expected until a new request's prompt is begun: after all that wait, by turns, and that of
    # tenants who flood the group, with the number of their open requests (`turns.Waits`).
    wait_s: float = 0.0
    turn_s: float = 0.0
    floods: dict[str, tuple[int, float]] = field(default_factory=dict)
    token_s: float = 0.0  # that a prompt token takes, in steps with others
    gpu: dict[str, int] = field(default_factory=dict)  # resident in the pool: key -> bytes
    host: dict[str, int] = field(default_factory=dict)  # packs in this node's memory: key -> bytes
    disk: dict[str, int] = field(default_factory=dict)  # packs on this node's disk: key -> bytes
    loading: list[str] = field(default_factory=list)
    prompt_tokens: dict[str, int] = field(default_factory=dict)  # key -> tokens, cumulative
    output_tokens: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(
        default_factory=dict
    )  # source tier ("host", "disk", "s3") -> count
    load_seconds: float = 0.0
    load_bytes: int = 0
    load_failures: int = 0
    evictions: int = 0
    prefix_hit_tokens: int = 0
    # How far tenants' virtual token counters are above a newcomer's: of at most REPORTED_TENANTS,
    # first of those with waiting requests, then of those furthest ahead.
    tenant_leads: dict[str, float] = field(default_factory=dict)
    tenants_waiting: dict[str, int] = field(default_factory=dict)  # of the same: waiting requests
    compiles_after_ready: int = 0  # kernels of rank 0 that requests had to wait for
    # For metrics alone; nothing is decided by them.
    admissions: dict[str, int] = field(default_factory=dict)  # tier of the adapter -> requests
    queue_seconds: dict[str, float] = field(default_factory=dict)  # `queue_time.Cause` -> seconds
    step_tokens: int = 0  # that went through the model
    step_adapters: int = 0  # distinct ones, added up over steps
    step_adapter_bytes: int = 0  # of the pool, that those take
    pool_bytes_active: int = 0  # of adapters that running requests use
    tier_load_seconds: dict[str, float] = field(default_factory=dict)  # fetch and copy, by source
    tier_load_bytes: dict[str, int] = field(default_factory=dict)
    device_bytes_total: int = 0  # rank 0's GPU; 0 on CPUs
    device_bytes_used: int = 0
    store_requests: dict[str, int] = field(default_factory=dict)  # "GetObject/ok" -> requests

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> EngineReport:
        return cls(**msg)


@dataclass
class GroupReport:
    """An engine's report with the group's place in the cluster."""

    deployment: str
    group: str  # stable while the replica lives
    host: str
    port: int  # of the front's multiplexed listener
    metrics_port: int
    draining: bool
    engine: EngineReport
    seen_epoch: int = 0  # newest controller epoch whose advice this group obeyed
    leaving: bool = False  # it is to stop, and serves until others hold what it alone does

    @property
    def stays(self) -> bool:
        return not (self.draining or self.leaving)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, msg: dict[str, Any]) -> GroupReport:
        return cls(**{**msg, "engine": EngineReport.from_wire(msg["engine"])})
