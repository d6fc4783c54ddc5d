"""What every gateway replica exposes."""

from __future__ import annotations

from .metric import Metric

# Seconds. A token on a GPU takes 2 to 10 ms; a cold adapter from S3 or a CPU demo takes seconds.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# There is a series of these for each of the busiest tenants, so they are fewer.
TENANT_TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)

GATEWAY = (
    Metric(
        "loraplex_gateway_requests_total",
        "counter",
        "requests",
        "overview",
        "HTTP requests answered, by route template and status code (499: the client went away).",
        ("route", "code"),
    ),
    Metric(
        "loraplex_gateway_in_flight_requests",
        "gauge",
        "requests",
        "overview",
        "Generation requests that a gateway replica is serving now.",
    ),
    Metric(
        "loraplex_gateway_input_tokens_total",
        "counter",
        "tokens",
        "tenant",
        "Prompt tokens of generation requests.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_gateway_output_tokens_total",
        "counter",
        "tokens",
        "tenant",
        "Tokens generated.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_gateway_limits_hit_total",
        "counter",
        "requests",
        "tenant",
        "Requests refused because a tenant's limit was reached (requests or tokens a minute, "
        "number or bytes of adapters).",
        ("tenant", "limit"),
    ),
    Metric(
        "loraplex_gateway_auth_failures_total",
        "counter",
        "requests",
        "overview",
        "Requests whose key was missing, unknown, revoked or not allowed to do this.",
        ("reason",),
    ),
    Metric(
        "loraplex_gateway_uploads_total",
        "counter",
        "requests",
        "store",
        "Adapter uploads by result: published, or the code of the refusal.",
        ("result",),
    ),
    Metric(
        "loraplex_gateway_continuations_total",
        "counter",
        "requests",
        "overview",
        "Requests that went on at another group after theirs failed.",
    ),
    Metric(
        "loraplex_gateway_routing_decisions_total",
        "counter",
        "requests",
        "controller",
        "Routing decisions by reason: base, placed, cold or spill.",
        ("reason",),
    ),
    Metric(
        "loraplex_gateway_time_to_first_token_seconds",
        "histogram",
        "seconds",
        "overview",
        "From a request's arrival to its first token, by where its adapter was (base: none).",
        ("tier",),
        TTFT_BUCKETS,
    ),
    Metric(
        "loraplex_gateway_inter_token_seconds",
        "histogram",
        "seconds",
        "overview",
        "Time between two tokens of a request after its first.",
        (),
        TOKEN_BUCKETS,
    ),
    Metric(
        "loraplex_gateway_request_seconds",
        "histogram",
        "seconds",
        "overview",
        "From a request's arrival to the end of its answer.",
        ("route",),
        REQUEST_BUCKETS,
    ),
    Metric(
        "loraplex_gateway_generations_total",
        "counter",
        "requests",
        "tenant",
        "Generation requests that ended, whatever their end.",
        ("tenant", "adapter"),
    ),
    Metric(
        "loraplex_gateway_tenant_time_to_first_token_seconds",
        "histogram",
        "seconds",
        "tenant",
        "From a request's arrival to its first token, by tenant.",
        ("tenant",),
        TENANT_TTFT_BUCKETS,
    ),
)
