"""`loraplex tenants`: what the operator does, with the admin key."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .cli_options import Key, Url, connect
from .cli_tables import print_table

tenants_app = typer.Typer(help="Tenants: create, list (admin key).", no_args_is_help=True)
Limit = Annotated[int | None, typer.Option(show_default="unlimited")]


@tenants_app.command()
def create(
    name: Annotated[str, typer.Argument(help="The tenant's name", show_default=False)],
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_adapters: Limit = None,
    label: Annotated[str, typer.Option(help="Label of its first key")] = "cli",
    url: Url = None,
    key: Key = None,
) -> None:
    """Make a tenant and its first key, which is shown this once."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_adapters": max_adapters,
    }
    limits = {field: value for field, value in limits.items() if value is not None}
    with connect(url, key) as client:
        tenant = client.call("POST", "/admin/v1/tenants", json={"name": name, "limits": limits})
        made = client.call("POST", f"/admin/v1/tenants/{tenant['id']}/keys", json={"label": label})
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"tenant {name}  id {tenant['id']}")
    console.print(f"key {made['key']}  (shown this once: keep it)")


@tenants_app.command("list")
def list_tenants(url: Url = None, key: Key = None) -> None:
    """Show all tenants and their limits."""
    with connect(url, key) as client:
        rows = client.pages("/admin/v1/tenants")
    if not rows:
        Console().print("no tenants yet; `loraplex tenants create NAME` makes one")
        return
    print_table(
        Console(),
        ("name", "id", "requests/min", "tokens/min", "adapters", "created"),
        [
            (
                row["name"],
                row["id"],
                *(
                    "unlimited" if row["limits"][field] is None else row["limits"][field]
                    for field in ("requests_per_minute", "tokens_per_minute", "max_adapters")
                ),
                str(row["created"])[:19],
            )
            for row in rows
        ],
    )
