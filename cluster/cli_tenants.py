"""`loraplex tenants`: what the operator does, with the admin key."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .cli_options import Key, Url, connect
from .cli_tables import print_table
from .errors import ClusterError

tenants_app = typer.Typer(help="Tenants: create, change, list (admin key).", no_args_is_help=True)
Limit = Annotated[int | None, typer.Option(show_default="unlimited")]
NewLimit = Annotated[int | None, typer.Option(show_default="unchanged")]
_WEIGHT = "Share of the compute when tenants compete, relative to the others'"


@tenants_app.command()
def create(
    name: Annotated[str, typer.Argument(help="The tenant's name", show_default=False)],
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_adapters: Limit = None,
    weight: Annotated[float | None, typer.Option(help=_WEIGHT, show_default="1")] = None,
    label: Annotated[str, typer.Option(help="Label of its first key")] = "cli",
    url: Url = None,
    key: Key = None,
) -> None:
    """Make a tenant and its first key, which is shown this once."""
    limits = _given(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_adapters=max_adapters,
        weight=weight,
    )
    with connect(url, key) as client:
        tenant = client.call("POST", "/admin/v1/tenants", json={"name": name, "limits": limits})
        made = client.call("POST", f"/admin/v1/tenants/{tenant['id']}/keys", json={"label": label})
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"tenant {name}  id {tenant['id']}")
    console.print(f"key {made['key']}  (shown this once: keep it)")


@tenants_app.command()
def change(
    name: Annotated[str, typer.Argument(help="The tenant's name or id", show_default=False)],
    requests_per_minute: NewLimit = None,
    tokens_per_minute: NewLimit = None,
    max_adapters: NewLimit = None,
    weight: Annotated[float | None, typer.Option(help=_WEIGHT, show_default="unchanged")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Change a tenant's limits or weight, from its next request on."""
    limits = _given(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_adapters=max_adapters,
        weight=weight,
    )
    with connect(url, key) as client:
        rows = client.pages("/admin/v1/tenants")
        ids = [row["id"] for row in rows if name in (row["name"], row["id"])]
        if not ids:
            raise ClusterError(f"no tenant is called {name!r}; see `loraplex tenants list`")
        client.call("PATCH", f"/admin/v1/tenants/{ids[0]}", json={"limits": limits})
    Console(soft_wrap=True, highlight=False).print(f"tenant {name} changed")


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
        ("name", "id", "requests/min", "tokens/min", "adapters", "weight", "created"),
        [
            (
                row["name"],
                row["id"],
                *(
                    "unlimited" if row["limits"][field] is None else row["limits"][field]
                    for field in ("requests_per_minute", "tokens_per_minute", "max_adapters")
                ),
                f"{row['limits']['weight']:g}",
                str(row["created"])[:19],
            )
            for row in rows
        ],
    )


def _given(**limits: float | None) -> dict[str, float]:
    return {field: value for field, value in limits.items() if value is not None}
