"""What the dashboards show beside one panel for each declared metric."""

from __future__ import annotations

from panels import RATE, Board, Chart, Figure, quantile, rate, ratio

_GROUP = ("group", "loraplex_engine_queued_requests")
_TENANT = ("tenant", "loraplex_gateway_generations_total")
# Groups know tenants by their ids, gateways by their names.
_TENANT_ID = ("tenant", "loraplex_engine_prompt_tokens_total")
_G = '{group=~"$group"}'
_T = '{tenant=~"$tenant"}'


def _per_step(metric: str) -> str:
    return ratio(rate(metric, _G, "group"), rate("loraplex_engine_steps_total", _G, "group"))


_ADMITTED = "loraplex_engine_admitted_requests_total"
_READ = rate("loraplex_engine_step_adapter_bytes_total", _G, "group")
_WEIGHTS = (
    f"sum by (group) (rate(loraplex_engine_steps_total{_G}{RATE}) "
    f"* on (group) group_left () loraplex_engine_weights_bytes{_G})"
)

BOARDS = (
    Board(
        "overview",
        "Loraplex: overview",
        "What clients see: requests, errors, latency.",
        (),
        (
            Figure(
                "Requests",
                rate("loraplex_gateway_requests_total"),
                "reqps",
                "HTTP requests answered per second.",
            ),
            Figure(
                "Failed",
                ratio(
                    "("
                    + rate("loraplex_gateway_requests_total", '{code=~"5.."}')
                    + " or vector(0))",
                    rate("loraplex_gateway_requests_total"),
                ),
                "percentunit",
                "Share of requests answered with a 5xx code.",
            ),
            Figure(
                "First token, p99",
                quantile(0.99, "loraplex_gateway_time_to_first_token_seconds"),
                "s",
                "99 of 100 requests get their first token within this time.",
            ),
            Figure(
                "Between tokens, p99",
                quantile(0.99, "loraplex_gateway_inter_token_seconds"),
                "s",
                "99 of 100 tokens follow the one before within this time.",
            ),
            Figure(
                "Tokens generated",
                rate("loraplex_gateway_output_tokens_total"),
                "short",
                "Tokens per second, all groups.",
            ),
            Figure(
                "Groups serving",
                'sum(loraplex_controller_groups{state="serving"})',
                "short",
                "Worker groups that report and take requests.",
            ),
        ),
        (
            Chart(
                "Tokens",
                (
                    (rate("loraplex_gateway_input_tokens_total"), "prompt"),
                    (rate("loraplex_gateway_output_tokens_total"), "generated"),
                ),
                "short",
                "Tokens per second through all gateways.",
            ),
            Chart(
                "Where adapters were",
                ((rate(_ADMITTED, by="tier"), "{{tier}}"),),
                "reqps",
                "Requests per second by where their adapter was when they came.",
                stacked=True,
            ),
            Chart(
                "Processes",
                (('sum by (kind) (up{job="loraplex"})', "{{kind}}"),),
                "short",
                "Processes that answer scrapes.",
            ),
        ),
    ),
    Board(
        "tenant",
        "Loraplex: tenants",
        "Who uses the service, and who is held back.",
        (_TENANT,),
        (
            Figure(
                "Tokens generated",
                rate("loraplex_gateway_output_tokens_total", _T),
                "short",
                "Tokens per second of the chosen tenants.",
            ),
            Figure(
                "First token, p99",
                quantile(0.99, "loraplex_gateway_tenant_time_to_first_token_seconds", _T),
                "s",
                "Of the chosen tenants' requests.",
            ),
            Figure(
                "Refused by limits",
                rate("loraplex_gateway_limits_hit_total", _T),
                "reqps",
                "Requests per second that a tenant's limit refused.",
            ),
        ),
        (
            Chart(
                "Busiest tenants",
                (
                    (
                        f"topk(10, {rate('loraplex_gateway_output_tokens_total', _T, 'tenant')})",
                        "{{tenant}}",
                    ),
                ),
                "short",
                "Tokens per second that were generated for them.",
                stacked=True,
            ),
        ),
    ),
    Board(
        "adapter",
        "Loraplex: adapters",
        "Which adapters are used, where they lie and what it costs to bring them in.",
        (_GROUP, _TENANT_ID),
        (
            Figure(
                "Pool in use",
                ratio(
                    f"sum(loraplex_engine_pool_used_bytes{_G})",
                    f"sum(loraplex_engine_pool_bytes{_G})",
                ),
                "percentunit",
                "Share of the adapter pools that holds adapters.",
            ),
            Figure(
                "Found on the GPU",
                ratio(
                    rate(_ADMITTED, '{group=~"$group",tier="gpu"}'),
                    rate(_ADMITTED, '{group=~"$group",tier!="base"}'),
                ),
                "percentunit",
                "Share of requests for adapters that found theirs in the pool.",
            ),
            Figure(
                "Loads",
                rate("loraplex_engine_loads_total", _G),
                "cps",
                "Adapters loaded into pools per second.",
            ),
            Figure(
                "Evictions",
                rate("loraplex_engine_evictions_total", _G),
                "cps",
                "Adapters put out of pools per second.",
            ),
        ),
        (
            Chart(
                "Pool by use",
                (
                    (f"sum(loraplex_engine_pool_active_bytes{_G})", "of running requests"),
                    (
                        f"sum(loraplex_engine_pool_used_bytes{_G})"
                        f" - sum(loraplex_engine_pool_active_bytes{_G})",
                        "idle",
                    ),
                    (
                        f"sum(loraplex_engine_pool_bytes{_G})"
                        f" - sum(loraplex_engine_pool_used_bytes{_G})",
                        "free",
                    ),
                ),
                "bytes",
                "Bytes of all chosen groups' adapter pools.",
                stacked=True,
            ),
            Chart(
                "Time of a load",
                (
                    (
                        ratio(
                            rate("loraplex_engine_load_seconds_total", _G, "tier"),
                            rate("loraplex_engine_loads_total", _G, "tier"),
                        ),
                        "{{tier}}",
                    ),
                ),
                "s",
                "Mean of fetch and copy, by the tier that the adapter came from.",
            ),
        ),
    ),
    Board(
        "group",
        "Loraplex: groups and GPUs",
        "Worker groups: steps, queues, KV cache, memory.",
        (_GROUP,),
        (
            Figure(
                "Running",
                f"sum(loraplex_engine_running_requests{_G})",
                "short",
                "Requests in the running batches.",
            ),
            Figure(
                "Queued",
                f"sum(loraplex_engine_queued_requests{_G})",
                "short",
                "Requests that wait for a place.",
            ),
            Figure(
                "KV cache in use",
                ratio(
                    f"sum(loraplex_engine_kv_used_blocks{_G})",
                    f"sum(loraplex_engine_kv_blocks{_G})",
                ),
                "percentunit",
                "Share of the KV cache's blocks.",
            ),
            Figure(
                "Step, mean",
                ratio(
                    rate("loraplex_engine_step_seconds_total", _G),
                    rate("loraplex_engine_steps_total", _G),
                ),
                "s",
                "Time of a model step.",
            ),
        ),
        (
            Chart(
                "Step, mean",
                ((_per_step("loraplex_engine_step_seconds_total"), "{{group}}"),),
                "s",
                "Time of a model step.",
            ),
            Chart(
                "Tokens in a step",
                ((_per_step("loraplex_engine_step_tokens_total"), "{{group}}"),),
                "short",
                "Mean over steps; a prompt brings many, a running request one.",
            ),
            Chart(
                "Adapters in a step",
                ((_per_step("loraplex_engine_step_adapters_total"), "{{group}}"),),
                "short",
                "Distinct ones, mean over steps.",
            ),
            Chart(
                "Share of LoRA in a step, estimated",
                ((f"{_READ} / clamp_min({_READ} + {_WEIGHTS}, 1e-9)", "{{group}}"),),
                "percentunit",
                "Bytes of the step's adapters in those of adapters and weights together. Kernels "
                "fuse both, so their times can't be told apart; steps of few tokens take as long "
                "as their bytes. Of either, a step reads only the experts that it needs.",
            ),
            Chart(
                "Queue, mean time",
                (
                    (
                        rate("loraplex_engine_queue_seconds_total", _G, "cause")
                        + f" / scalar(clamp_min({rate(_ADMITTED, _G)}, 1e-9))",
                        "{{cause}}",
                    ),
                ),
                "s",
                "Time that a request waits, by what it lacks.",
                stacked=True,
            ),
            Chart(
                "Memory of processes",
                (
                    (
                        'sum by (kind, replica) (process_resident_memory_bytes{kind!=""})',
                        "{{kind}} {{replica}}",
                    ),
                ),
                "bytes",
                "Resident memory of each process that exports.",
            ),
        ),
    ),
    Board(
        "controller",
        "Loraplex: controller",
        "Placement, moves and routing.",
        (),
        (
            Figure("Epoch", "max(loraplex_controller_epoch)", "short", "Of the one that runs."),
            Figure(
                "Groups serving",
                'sum(loraplex_controller_groups{state="serving"})',
                "short",
                "Worker groups that report and take requests.",
            ),
            Figure(
                "Adapters placed",
                "sum(loraplex_controller_placed_adapters)",
                "short",
                "On at least one group.",
            ),
            Figure(
                "Tick, p99",
                quantile(0.99, "loraplex_controller_tick_seconds"),
                "s",
                "Time of a planning tick; there are two a second.",
            ),
        ),
    ),
    Board(
        "store",
        "Loraplex: store",
        "The object store and the way of uploads into it.",
        (),
        (
            Figure(
                "Requests",
                rate("loraplex_store_requests_total"),
                "reqps",
                "Requests to the object store per second, of all processes.",
            ),
            Figure(
                "Failed",
                ratio(
                    "("
                    + rate(
                        "loraplex_store_requests_total",
                        '{result=~"denied|throttled|error|unreachable"}',
                    )
                    + " or vector(0))",
                    rate("loraplex_store_requests_total"),
                ),
                "percentunit",
                "Share of requests that the store refused, failed or never answered.",
            ),
            Figure(
                "Ingest, p99",
                quantile(0.99, "loraplex_ingest_seconds"),
                "s",
                "99 of 100 uploads are published within this time of reaching the ingest actor.",
            ),
        ),
    ),
)
