"""`loraplex adapters`: what a tenant does with its own adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_options import Key, Url, connect
from .cli_tables import print_table

adapters_app = typer.Typer(
    help="Your adapters: push, list, rollback, delete.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="The adapter's name", show_default=False)]


@adapters_app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name to serve it under [the folder's name]")
    ] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Upload an adapter, or a new version of one; returns when it can be used."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from .cli_client import adapter_files

    console = Console()
    config, weights = adapter_files(folder)
    name = name or folder.resolve().name
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TransferSpeedColumn(), console=console, transient=True)
    with connect(url, key) as client, bar:
        task = bar.add_task(f"uploading {name}", total=weights.stat().st_size)

        def report(sent: int, total: int) -> None:
            done = sent >= total
            bar.update(
                task,
                completed=sent,
                total=None if done else total,
                description=f"{'checking and publishing' if done else 'uploading'} {name}",
            )

        version = client.upload(name, config, weights, report)
    console.print(
        f"{name}@{version['version']}  {version['format']}, rank {version['rank_max']}, "
        f"{_size(version['bytes'])}, digest {version['digest'][:12]}",
        highlight=False,
    )


@adapters_app.command("list")
def list_adapters(url: Url = None, key: Key = None) -> None:
    """Show your adapters."""
    with connect(url, key) as client:
        rows = client.pages("/v1/adapters")
    if not rows:
        Console().print("no adapters yet; `loraplex adapters push FOLDER` uploads one")
        return
    print_table(
        Console(),
        ("name", "version", "format", "rank", "size", "digest", "created", "status"),
        [
            (
                row["name"],
                row["current_version"],
                row["format"],
                row["rank_max"],
                _size(row["bytes"]),
                row["digest"][:12],
                str(row["created"])[:19],
                row["status"],
            )
            for row in rows
        ],
    )


@adapters_app.command()
def rollback(
    name: Name,
    to: Annotated[
        int | None, typer.Option("--to", help="Version to serve again [the one before]")
    ] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Serve an earlier version again."""
    body: dict[str, Any] = {} if to is None else {"version": to}
    with connect(url, key) as client:
        alias = client.call("POST", f"/v1/adapters/{name}/rollback", json=body)
    Console().print(f"{name} is version {alias['current_version']} now", highlight=False)


@adapters_app.command()
def delete(name: Name, url: Url = None, key: Key = None) -> None:
    """Delete an adapter with all its versions."""
    with connect(url, key) as client:
        client.call("DELETE", f"/v1/adapters/{name}")
    Console().print(f"{name} is deleted", highlight=False)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
