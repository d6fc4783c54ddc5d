"""What a dashboard is made of, and the panel that each declared metric gets of itself."""

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


def rate(metric: str, selector: str = "", by: str = "") -> str:
    """A counter's growth per second."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{selector}{RATE}))"


def ratio(part: str, whole: str) -> str:
    """0 where there is nothing to divide by."""
    return f"{part} / clamp_min({whole}, 1e-9)"


def quantile(q: float, histogram: str, selector: str = "") -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket{selector}{RATE})))"


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
