"""Makes dashboards/*.json from the declared metrics. Run it after changing one:

python deploy/grafana/generate.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from boards import BOARDS
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableRefresh,
)
from panels import Board, Chart, Figure, metric_charts

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OUT = Path(__file__).parent / "dashboards"
TAG = "loraplex"
COLUMNS = 24
FIGURE_HEIGHT = 4
PANEL_SIZE = (8, 8)  # columns, height
LINE_FILL, AREA_FILL = 10, 60  # percent of opacity below a line, of a stacked area


def build(board: Board) -> str:
    """A dashboard as JSON text."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"loraplex-{board.name}")
        .description(board.description)
        .tags([TAG])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Loraplex")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for label, metric in board.variables:
        made = made.with_variable(_variable(label, metric))
    number = 0
    for figure in board.figures:
        number += 1
        width = COLUMNS // len(board.figures)  # they fill a row
        made = made.with_panel(_figure_panel(figure, number, width))
    for chart in (*board.charts, *metric_charts(board)):
        number += 1
        made = made.with_panel(_chart_panel(chart, number))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


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


def _figure_panel(figure: Figure, number: int, width: int) -> stat.Panel:
    return (
        stat.Panel()
        .id(number)
        .title(figure.title)
        .description(figure.description)
        .datasource(SOURCE)
        .unit(figure.unit)
        .span(width)
        .height(FIGURE_HEIGHT)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(figure.expr, "", "A"))
    )


def _chart_panel(chart: Chart, number: int) -> timeseries.Panel:
    width, height = PANEL_SIZE
    panel = (
        timeseries.Panel()
        .id(number)
        .title(chart.title)
        .description(chart.description)
        .datasource(SOURCE)
        .unit(chart.unit)
        .span(width)
        .height(height)
        .min(0)
        .fill_opacity(AREA_FILL if chart.stacked else LINE_FILL)
        .legend(VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if chart.stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    for (expr, legend), ref in zip(chart.queries, "ABC", strict=False):
        panel = panel.with_target(_query(expr, legend, ref))
    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        path = out / f"{board.name}.json"
        path.write_text(build(board))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
