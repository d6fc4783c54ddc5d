"""Makes dashboards/loraplex.json from the declared metrics. Run it after changing one:

python deploy/grafana/generate.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, SortOrder, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
)
from loraplex.cluster.metrics import METRICS, Metric

OUTPUT = Path(__file__).parent / "dashboards" / "loraplex.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "[$__rate_interval]"
ROWS = {
    "traffic": "Traffic",
    "latency": "Latency",
    "adapters": "Adapters",
    "groups": "Groups",
    "controller": "Controller",
}
QUANTILES = (0.5, 0.95, 0.99)
ROW_IDS = 1000  # panels count from 1
STAT_SIZE = (4, 4)  # width of 24, height
PANEL_SIZE = (8, 8)


@dataclass(frozen=True)
class Figure:
    """A single number of the overview."""

    title: str
    expr: str
    unit: str
    description: str


OVERVIEW = (
    Figure(
        "Requests",
        f"sum(rate(loraplex_gateway_requests_total{RATE}))",
        "reqps",
        "HTTP requests answered per second.",
    ),
    Figure(
        "Failed",
        f'(sum(rate(loraplex_gateway_requests_total{{code=~"5.."}}{RATE})) or vector(0))'
        f" / clamp_min(sum(rate(loraplex_gateway_requests_total{RATE})), 1e-9)",
        "percentunit",
        "Share of requests answered with a 5xx code.",
    ),
    Figure(
        "First token, p99",
        "histogram_quantile(0.99, sum by (le) "
        f"(rate(loraplex_gateway_time_to_first_token_seconds_bucket{RATE})))",
        "s",
        "99 of 100 requests get their first token within this time.",
    ),
    Figure(
        "Tokens generated",
        f"sum(rate(loraplex_gateway_output_tokens_total{RATE}))",
        "short",
        "Tokens per second, all groups.",
    ),
    Figure(
        "Groups serving",
        'sum(loraplex_controller_groups{state="serving"})',
        "short",
        "Worker groups that report and take requests.",
    ),
    Figure(
        "Adapter pool in use",
        "sum(loraplex_engine_pool_used_bytes) / sum(loraplex_engine_pool_bytes)",
        "percentunit",
        "Share of all groups' adapter pools that holds adapters.",
    ),
)


def build() -> str:
    """The dashboard as JSON text."""
    board = (
        dashboard.Dashboard("Loraplex")
        .uid("loraplex")
        .description("Multi-tenant LoRA serving: traffic, latency, adapters, groups, controller.")
        .tags(["loraplex"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_variable("group", "loraplex_engine_queued_requests"))
        .with_variable(_variable("tenant", "loraplex_gateway_output_tokens_total"))
        .with_row(dashboard.Row("Overview").id(ROW_IDS))
    )
    number = 1
    for figure in OVERVIEW:
        board = board.with_panel(_figure_panel(figure, number))
        number += 1
    for position, (row, title) in enumerate(ROWS.items(), 1):
        board = board.with_row(dashboard.Row(title).id(ROW_IDS + position))
        for metric in METRICS.values():
            if metric.row == row:
                board = board.with_panel(_metric_panel(metric, number))
                number += 1
        if row == "groups":
            board = board.with_panel(_process_panel(number))
            number += 1
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def queries(metric: Metric) -> list[tuple[str, str]]:
    """(expression, legend) of a metric's panel."""
    filters = [f'{name}=~"${name}"' for name in ("group", "tenant") if name in metric.labels]
    selector = "{" + ",".join(filters) + "}" if filters else ""
    legend = " ".join("{{" + name + "}}" for name in metric.labels)
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


def _variable(label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {label})")
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)  # groups and tenants come and go
    )


def _query(expr: str, legend: str, ref: str) -> prometheus.Dataquery:
    query = prometheus.Dataquery().datasource(SOURCE).expr(expr).ref_id(ref)
    return query.legend_format(legend) if legend else query


def _figure_panel(figure: Figure, number: int) -> stat.Panel:
    width, height = STAT_SIZE
    return (
        stat.Panel()
        .id(number)
        .title(figure.title)
        .description(figure.description)
        .datasource(SOURCE)
        .unit(figure.unit)
        .span(width)
        .height(height)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(figure.expr, "", "A"))
    )


def _series_panel(title: str, description: str, unit: str, number: int) -> timeseries.Panel:
    width, height = PANEL_SIZE
    return (
        timeseries.Panel()
        .id(number)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(height)
        .min(0)
        .fill_opacity(10)
        .legend(VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )


def _metric_panel(metric: Metric, number: int) -> timeseries.Panel:
    panel = _series_panel(_title(metric), metric.help, _unit(metric), number)
    for (expr, legend), ref in zip(queries(metric), "ABC", strict=False):
        panel = panel.with_target(_query(expr, legend, ref))
    return panel


def _process_panel(number: int) -> timeseries.Panel:
    panel = _series_panel(
        "Memory of processes", "Resident memory of each process that exports.", "bytes", number
    )
    expr = 'sum by (kind, replica) (process_resident_memory_bytes{kind!=""})'
    return panel.with_target(_query(expr, "{{kind}} {{replica}}", "A"))


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(build())
    print(f"wrote {OUTPUT}")
