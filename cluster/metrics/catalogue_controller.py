"""What the controller and the ingest actor expose, and what every process does of its store."""

from __future__ import annotations

from .metric import Metric

# Seconds.
TICK_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
# From a demo's adapter to one of 2 GB, with its way to the store and back.
INGEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

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
        "adapter",
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

INGEST = (
    Metric(
        "loraplex_ingest_seconds",
        "histogram",
        "seconds",
        "store",
        "Time to validate, pack and publish an upload, by result (published, refused, failed).",
        ("result",),
        INGEST_BUCKETS,
    ),
)

STORE = (
    Metric(
        "loraplex_store_requests_total",
        "counter",
        "requests",
        "store",
        "Requests to object stores, each retry counted, by operation and result (ok, not_found, "
        "conflict, denied, throttled, error, unreachable).",
        ("operation", "result"),
    ),
)
