"""What the dashboards show beside one panel for each declared metric."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.cluster.metrics import METRICS, Metric

RATE = "[$__rate_interval]"
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Figure:
    """A single number at a dashboard's head."""

    title: str
    expr: str
    unit: str
    description: str


@dataclass(frozen=True)
class Chart:
    """Lines over time: (expression, legend) each."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str
    description: str
    stacked: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard. `variables` are labels to choose by: (label, a metric that has it)."""

    name: str
    title: str
    description: str
    variables: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    charts: tuple[Chart, ...] = ()


_GROUP = ("group", "loraplex_engine_queued_requests")
_TENANT = ("tenant", "loraplex_gateway_generations_total")
# Groups know tenants by their ids, gateways by their names.
_TENANT_ID = ("tenant", "loraplex_engine_prompt_tokens_total")
_G = '{group=~"$group"}'
_T = '{tenant=~"$tenant"}'


def _rate(metric: str, selector: str = "", by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{selector}{RATE}))"


def _ratio(part: str, whole: str) -> str:
    return f"{part} / clamp_min({whole}, 1e-9)"


def _quantile(q: float, histogram: str, selector: str = "") -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket{selector}{RATE})))"


def _per_step(metric: str) -> str:
    return _ratio(_rate(metric, _G, "group"), _rate("loraplex_engine_steps_total", _G, "group"))


_ADMITTED = "loraplex_engine_admitted_requests_total"
_READ = _rate("loraplex_engine_step_adapter_bytes_total", _G, "group")
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
                _rate("loraplex_gateway_requests_total"),
                "reqps",
                "HTTP requests answered per second.",
            ),
            Figure(
                "Failed",
                _ratio(
                    "("
                    + _rate("loraplex_gateway_requests_total", '{code=~"5.."}')
                    + " or vector(0))",
                    _rate("loraplex_gateway_requests_total"),
                ),
                "percentunit",
                "Share of requests answered with a 5xx code.",
            ),
            Figure(
                "First token, p99",
                _quantile(0.99, "loraplex_gateway_time_to_first_token_seconds"),
                "s",
                "99 of 100 requests get their first token within this time.",
            ),
            Figure(
                "Between tokens, p99",
                _quantile(0.99, "loraplex_gateway_inter_token_seconds"),
                "s",
                "99 of 100 tokens follow the one before within this time.",
            ),
            Figure(
                "Tokens generated",
                _rate("loraplex_gateway_output_tokens_total"),
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
                    (_rate("loraplex_gateway_input_tokens_total"), "prompt"),
                    (_rate("loraplex_gateway_output_tokens_total"), "generated"),
                ),
                "short",
                "Tokens per second through all gateways.",
            ),
            Chart(
                "Where adapters were",
                ((_rate(_ADMITTED, by="tier"), "{{tier}}"),),
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
                _rate("loraplex_gateway_output_tokens_total", _T),
                "short",
                "Tokens per second of the chosen tenants.",
            ),
            Figure(
                "First token, p99",
                _quantile(0.99, "loraplex_gateway_tenant_time_to_first_token_seconds", _T),
                "s",
                "Of the chosen tenants' requests.",
            ),
            Figure(
                "Refused by limits",
                _rate("loraplex_gateway_limits_hit_total", _T),
                "reqps",
                "Requests per second that a tenant's limit refused.",
            ),
        ),
        (
            Chart(
                "Busiest tenants",
                (
                    (
                        f"topk(10, {_rate('loraplex_gateway_output_tokens_total', _T, 'tenant')})",
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
                _ratio(
                    f"sum(loraplex_engine_pool_used_bytes{_G})",
                    f"sum(loraplex_engine_pool_bytes{_G})",
                ),
                "percentunit",
                "Share of the adapter pools that holds adapters.",
            ),
            Figure(
                "Found on the GPU",
                _ratio(
                    _rate(_ADMITTED, '{group=~"$group",tier="gpu"}'),
                    _rate(_ADMITTED, '{group=~"$group",tier!="base"}'),
                ),
                "percentunit",
                "Share of requests for adapters that found theirs in the pool.",
            ),
            Figure(
                "Loads",
                _rate("loraplex_engine_loads_total", _G),
                "cps",
                "Adapters loaded into pools per second.",
            ),
            Figure(
                "Evictions",
                _rate("loraplex_engine_evictions_total", _G),
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
                        _ratio(
                            _rate("loraplex_engine_load_seconds_total", _G, "tier"),
                            _rate("loraplex_engine_loads_total", _G, "tier"),
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
                _ratio(
                    f"sum(loraplex_engine_kv_used_blocks{_G})",
                    f"sum(loraplex_engine_kv_blocks{_G})",
                ),
                "percentunit",
                "Share of the KV cache's blocks.",
            ),
            Figure(
                "Step, mean",
                _ratio(
                    _rate("loraplex_engine_step_seconds_total", _G),
                    _rate("loraplex_engine_steps_total", _G),
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
                        _rate("loraplex_engine_queue_seconds_total", _G, "cause")
                        + f" / scalar(clamp_min({_rate(_ADMITTED, _G)}, 1e-9))",
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
                _quantile(0.99, "loraplex_controller_tick_seconds"),
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
                _rate("loraplex_store_requests_total"),
                "reqps",
                "Requests to the object store per second, of all processes.",
            ),
            Figure(
                "Failed",
                _ratio(
                    "("
                    + _rate(
                        "loraplex_store_requests_total",
                        '{result=~"denied|throttled|error|unreachable"}',
                    )
                    + " or vector(0))",
                    _rate("loraplex_store_requests_total"),
                ),
                "percentunit",
                "Share of requests that the store refused, failed or never answered.",
            ),
            Figure(
                "Ingest, p99",
                _quantile(0.99, "loraplex_ingest_seconds"),
                "s",
                "99 of 100 uploads are published within this time of reaching the ingest actor.",
            ),
        ),
    ),
)


def metric_charts(board: Board) -> list[Chart]:
    """A chart for each declared metric that belongs on a board."""
    return [_chart(m, board) for m in METRICS.values() if m.board == board.name]


def _chart(metric: Metric, board: Board) -> Chart:
    return Chart(_title(metric), tuple(_queries(metric, board)), _unit(metric), metric.help)


def _queries(metric: Metric, board: Board) -> list[tuple[str, str]]:
    variables = [label for label, _ in board.variables if label in metric.labels]
    filters = ",".join(f'{label}=~"${label}"' for label in variables)
    selector = f"{{{filters}}}" if filters else ""
    legend = " ".join("{{" + label + "}}" for label in metric.labels)
    by = f" by ({', '.join(metric.labels)})" if metric.labels else ""
    if metric.kind == "counter":
        return [(f"sum{by} (rate({metric.name}{selector}{RATE}))", legend)]
    if metric.kind == "gauge":
        # Without a unit it is a state, which doesn't add up over processes.
        return [(f"{'sum' if metric.unit else 'max'}{by} ({metric.name}{selector})", legend)]
    labels = ", ".join(("le", *metric.labels))
    buckets = f"sum by ({labels}) (rate({metric.name}_bucket{selector}{RATE}))"
    return [
        (f"histogram_quantile({q}, {buckets})", f"p{q * 100:g} {legend}".strip()) for q in QUANTILES
    ]


def _unit(metric: Metric) -> str:
    if metric.kind != "counter":
        return {"bytes": "bytes", "seconds": "s"}.get(metric.unit, "short")
    # Seconds per second are the share of time that something took.
    rates = {"bytes": "Bps", "seconds": "percentunit", "requests": "reqps", "tokens": "short"}
    return rates.get(metric.unit, "cps")


def _title(metric: Metric) -> str:
    words = metric.name.removeprefix("loraplex_").removesuffix("_total").split("_")
    shown = " ".join("KV" if word == "kv" else word for word in words)
    ending = {"counter": "/s", "gauge": "", "histogram": ", p50 to p99"}[metric.kind]
    return shown[0].upper() + shown[1:] + ending
