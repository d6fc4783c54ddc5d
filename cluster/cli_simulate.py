"""`loraplex simulate`: policies compared on a generated or recorded trace."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .cli_tables import print_table
from .errors import ClusterError

if TYPE_CHECKING:
    from .simulate import Abuse, Summary

_TITLES = (
    "policy",
    "requests",
    "p50 TTFT",
    "p99 TTFT",
    "in SLO",
    "worst decile",
    "to pools",
    "from disk",
    "from S3",
)
_ABUSE_TITLES = (
    "the others, by",
    "tokens/s without",
    "with",
    "kept",
    "p99 TTFT without",
    "with",
    "times",
)


def simulate_command(
    scenario: Annotated[
        str, typer.Argument(help="A published one; a name that there isn't shows all")
    ] = "alternating",
    trace: Annotated[
        Path | None, typer.Option(help="A recorded trace (JSON lines) instead of the scenario's")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Worker groups [the scenario's]")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Seconds that the figures leave out [the scenario's]")
    ] = None,
    pool_gb: Annotated[float | None, typer.Option(help="Adapter pool of a group")] = None,
    policies: Annotated[
        str,
        typer.Option(help="Separated by commas; loraplex-fcfs: groups without turns of tenants"),
    ] = "loraplex,hash,ray,p2c,dynamo",
    abuser: Annotated[
        str | None,
        typer.Option(help="Also what others get without this tenant and with it [the scenario's]"),
    ] = None,
    slo: Annotated[float, typer.Option(help="Seconds to the first token")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the trace and of policies that draw")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write p99 TTFT as an SVG")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the trace, to run it again")] = None,
) -> None:
    """Compare placement and routing policies in a simulated cluster."""
    from .simulate import (
        ABUSE_POLICIES,
        ABUSER,
        SCENARIOS,
        Hardware,
        bars,
        compare,
        compare_abuse,
        floor,
        generate,
        load_trace,
        save_trace,
    )

    if scenario not in SCENARIOS:
        raise ClusterError(f"no scenario is called {scenario!r}; there are {', '.join(SCENARIOS)}")
    wanted = [name.strip() for name in policies.split(",")]
    if unknown := sorted(set(wanted) - set(ABUSE_POLICIES)):
        there = ", ".join(ABUSE_POLICIES)
        raise ClusterError(f"no policy is called {unknown[0]!r}; there are {there}")
    chosen = SCENARIOS[scenario]
    requests = load_trace(trace) if trace else generate(chosen.work, seed)
    if abuser is None and trace is None and chosen.work.abuse:
        abuser = ABUSER
    if abuser is not None and abuser not in (tenants := {r.tenant for r in requests.requests}):
        there = ", ".join(sorted(tenants)[:8])
        raise ClusterError(f"no request is of tenant {abuser!r}; there are those of {there}, ...")
    if save is not None:
        save_trace(requests, save)
    hardware = Hardware()
    if pool_gb is not None:
        hardware = replace(hardware, pool_bytes=int(pool_gb * 1e9))
    groups = chosen.groups if groups is None else groups
    warmup = chosen.warmup_s if warmup is None else warmup
    rows = compare(
        requests,
        groups,
        warmup,
        seed,
        wanted,
        hardware,
        slo,
    )
    least = floor(requests, groups * hardware.pool_bytes, warmup)
    bound = ("floor", *[""] * 5, f"{least.gpu_gb:.1f} GB", "", f"{least.s3_gb:.1f} GB")
    print_table(Console(), _TITLES, [*(_row(s) for s in rows), bound])
    figures = {"settings": requests.settings, "results": [asdict(s) for s in rows]}
    if abuser is not None:
        harm = compare_abuse(requests, abuser, groups, warmup, seed, wanted, hardware)
        print_table(Console(), _ABUSE_TITLES, [_abuse_row(a) for a in harm])
        figures["abuse"] = [asdict(a) for a in harm]
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    if plot is not None:
        name = trace.stem if trace else scenario
        plot.write_text(bars({name: rows}, "p99_ttft_s", "p99 time to first token, seconds"))


def _row(s: Summary) -> tuple[object, ...]:
    return (
        s.policy,
        s.requests,
        f"{s.p50_ttft_s:.3f} s",
        f"{s.p99_ttft_s:.3f} s",
        f"{s.slo:.1%}",
        f"{s.slo_worst_decile:.1%}",
        f"{s.gpu_gb:.1f} GB",
        f"{s.disk_gb:.1f} GB",
        f"{s.s3_gb:.1f} GB",
    )


def _abuse_row(a: Abuse) -> tuple[object, ...]:
    return (
        a.policy,
        f"{a.without.tokens_s:.0f}",
        f"{a.beside.tokens_s:.0f}",
        f"{a.throughput:.1%}",
        f"{a.without.p99_ttft_s:.3f} s",
        f"{a.beside.p99_ttft_s:.3f} s",
        f"{a.p99_times:.2f}",
    )
