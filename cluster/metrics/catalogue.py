"""Every metric that Loraplex exposes, declared once; exporters and dashboards follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "requests", "tokens", "bytes", "seconds", "blocks", "adapters", "groups"]
Row = Literal["traffic", "latency", "adapters", "groups", "controller"]

# Seconds. A token on a GPU takes 2 to 10 ms; a cold adapter from S3 or a CPU demo takes seconds.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TICK_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

# What stands for everything beyond the busiest adapters, so that series stay bounded.
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """One declared metric.

    `name` is the family's name as Prometheus shows it (counters end in `_total`); a histogram
    exposes `_bucket`, `_sum` and `_count`. `row` is the dashboard row that shows it.
    """

    name: str
    kind: Kind
    unit: Unit
    row: Row
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def samples(self) -> tuple[str, ...]:
        """Names that a query may use."""
        if self.kind == "histogram":
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)


GATEWAY = (
    Metric(
        "loraplex_gateway_requests_total",
        "counter",
        "requests",
        "traffic",
        "HTTP requests answered, by route template and status code (499: the client went away).",
        ("route", "code"),
    ),
    Metric(
        "loraplex_gateway_in_flight_requests",
        "gauge",
        "requests",
        "traffic",
        "Generation requests that a gateway replica is serving now.",
    ),
    Metric(
        "loraplex_gateway_input_tokens_total",
        "counter",
        "tokens",
        "traffic",
        "Prompt tokens of generation requests.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_gateway_output_tokens_total",
        "counter",
        "tokens",
        "traffic",
        "Tokens generated.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_gateway_rate_limited_total",
        "counter",
        "requests",
        "traffic",
        "Requests refused because a tenant's limit was reached.",
        ("limit",),
    ),
    Metric(
        "loraplex_gateway_auth_failures_total",
        "counter",
        "requests",
        "traffic",
        "Requests whose key was missing, unknown, revoked or not allowed to do this.",
        ("reason",),
    ),
    Metric(
        "loraplex_gateway_uploads_total",
        "counter",
        "requests",
        "adapters",
        "Adapter uploads by result: published, or the code of the refusal.",
        ("result",),
    ),
    Metric(
        "loraplex_gateway_continuations_total",
        "counter",
        "requests",
        "groups",
        "Requests that went on at another group after theirs failed.",
    ),
    Metric(
        "loraplex_gateway_routing_decisions_total",
        "counter",
        "requests",
        "groups",
        "Routing decisions by reason: base, placed, cold or spill.",
        ("reason",),
    ),
    Metric(
        "loraplex_gateway_time_to_first_token_seconds",
        "histogram",
        "seconds",
        "latency",
        "From a request's arrival to its first token, by where its adapter was (base: none).",
        ("tier",),
        TTFT_BUCKETS,
    ),
    Metric(
        "loraplex_gateway_inter_token_seconds",
        "histogram",
        "seconds",
        "latency",
        "Time between two tokens of a request after its first.",
        (),
        TOKEN_BUCKETS,
    ),
    Metric(
        "loraplex_gateway_request_seconds",
        "histogram",
        "seconds",
        "latency",
        "From a request's arrival to the end of its answer.",
        ("route",),
        REQUEST_BUCKETS,
    ),
)

ENGINE = (
    Metric(
        "loraplex_engine_queued_requests",
        "gauge",
        "requests",
        "groups",
        "Requests that wait for a place in the batch.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_running_requests",
        "gauge",
        "requests",
        "groups",
        "Requests in the running batch.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_steps_total",
        "counter",
        "",
        "groups",
        "Model steps.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_step_seconds_total",
        "counter",
        "seconds",
        "groups",
        "Time spent in model steps.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_kv_blocks",
        "gauge",
        "blocks",
        "groups",
        "Blocks of the KV cache.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_kv_used_blocks",
        "gauge",
        "blocks",
        "groups",
        "Blocks of the KV cache in use.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_preemptions_total",
        "counter",
        "requests",
        "groups",
        "Requests put back into the queue because the KV cache was full.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_prefix_hit_tokens_total",
        "counter",
        "tokens",
        "groups",
        "Prompt tokens found in the prefix cache.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_prompt_tokens_total",
        "counter",
        "tokens",
        "traffic",
        "Prompt tokens that a group worked through.",
        ("group", "tenant", "adapter"),
    ),
    Metric(
        "loraplex_engine_output_tokens_total",
        "counter",
        "tokens",
        "traffic",
        "Tokens that a group generated.",
        ("group", "tenant", "adapter"),
    ),
    Metric(
        "loraplex_engine_pool_bytes",
        "gauge",
        "bytes",
        "adapters",
        "Size of the adapter pool.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_pool_used_bytes",
        "gauge",
        "bytes",
        "adapters",
        "Bytes of the adapter pool in use.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_adapter_bytes",
        "gauge",
        "bytes",
        "adapters",
        "Bytes of the pool that an adapter takes.",
        ("group", "tenant", "adapter"),
    ),
    Metric(
        "loraplex_engine_resident_adapters",
        "gauge",
        "adapters",
        "adapters",
        "Adapters that a group holds, by tier (gpu: its pool, disk: its node's packs).",
        ("group", "tier"),
    ),
    Metric(
        "loraplex_engine_loading_adapters",
        "gauge",
        "adapters",
        "adapters",
        "Adapters on their way into the pool.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_loads_total",
        "counter",
        "adapters",
        "adapters",
        "Adapters loaded into the pool, by the tier that they came from.",
        ("group", "tier"),
    ),
    Metric(
        "loraplex_engine_load_seconds_total",
        "counter",
        "seconds",
        "adapters",
        "Time that loads took, added up over loads.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_load_bytes_total",
        "counter",
        "bytes",
        "adapters",
        "Bytes loaded into the pool.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_load_failures_total",
        "counter",
        "adapters",
        "adapters",
        "Adapters that could not be loaded.",
        ("group",),
    ),
    Metric(
        "loraplex_engine_evictions_total",
        "counter",
        "adapters",
        "adapters",
        "Adapters put out of the pool.",
        ("group",),
    ),
)

CONTROLLER = (
    Metric(
        "loraplex_controller_epoch",
        "gauge",
        "",
        "controller",
        "Epoch of the running controller; each start takes the next.",
    ),
    Metric(
        "loraplex_controller_groups",
        "gauge",
        "groups",
        "controller",
        "Worker groups that report, by state (serving, draining).",
        ("state",),
    ),
    Metric(
        "loraplex_controller_groups_lost_total",
        "counter",
        "groups",
        "controller",
        "Groups dropped from the table because they stopped reporting.",
    ),
    Metric(
        "loraplex_controller_desired_adapters",
        "gauge",
        "adapters",
        "controller",
        "Adapters that the plan wants a group to hold.",
        ("group",),
    ),
    Metric(
        "loraplex_controller_placed_adapters",
        "gauge",
        "adapters",
        "controller",
        "Adapters that the plan has placed on at least one group.",
    ),
    Metric(
        "loraplex_controller_replicas",
        "gauge",
        "adapters",
        "controller",
        "Copies that the plan wants beyond each adapter's first.",
    ),
    Metric(
        "loraplex_controller_demand_tokens_per_second",
        "gauge",
        "tokens",
        "adapters",
        "Smoothed demand as the planner sees it; prompt tokens count 1, generated ones 2.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_controller_moves_total",
        "counter",
        "adapters",
        "controller",
        "Copies planned, arrived (done), or given up before they arrived (dropped).",
        ("result",),
    ),
    Metric(
        "loraplex_controller_moved_bytes_total",
        "counter",
        "bytes",
        "controller",
        "Bytes of the copies that were planned.",
    ),
    Metric(
        "loraplex_controller_tick_seconds",
        "histogram",
        "seconds",
        "controller",
        "Time of one planning tick.",
        (),
        TICK_BUCKETS,
    ),
    Metric(
        "loraplex_controller_pending_purges",
        "gauge",
        "adapters",
        "controller",
        "Deleted adapters that a group may still hold.",
    ),
)

METRICS: dict[str, Metric] = {m.name: m for m in (*GATEWAY, *ENGINE, *CONTROLLER)}
