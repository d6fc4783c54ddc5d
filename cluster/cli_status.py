"""`loraplex status`: groups and placement as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from .cli_client import Client
from .cli_tables import print_table

_DIGEST_CHARS = 12


def show_status(client: Client, console: Console) -> None:
    """Prints what the controller knows; needs the admin key."""
    placement = client.call("GET", "/admin/v1/placement")
    tenants = {tenant["id"]: tenant["name"] for tenant in client.pages("/admin/v1/tenants")}
    titles = ("group", "deployment", "running", "queued", "pool", "adapters", "weights", "state")
    print_table(console, titles, [_group(group) for group in placement["groups"]])
    console.print()
    if placement["adapters"]:
        titles = ("tenant", "adapter digest", "tokens/s", "placed on", "loaded on")
        print_table(console, titles, list(_adapters(placement, tenants)))
    else:
        console.print("no adapter was asked for lately", highlight=False)


def _group(group: dict[str, Any]) -> tuple[object, ...]:
    total = group["pool_bytes_total"]
    share = f"{group['pool_bytes_used'] / total:.0%} of " if total else ""
    state = "draining" if group["draining"] else "ready"
    if group["loading"]:
        state += f", loads {len(group['loading'])}"
    return (
        group["group"],
        group["deployment"],
        group["running"],
        group["queued"],
        f"{share}{total / 1e6:.0f} MB",
        len(group["resident"]),
        f"{group['weights_bytes'] / 1e9:.1f} GB in {group['weights_seconds']:.1f} s",
        state,
    )


def _adapters(placement: dict[str, Any], tenants: dict[str, str]) -> Iterator[tuple[object, ...]]:
    """The busiest first."""
    demand = {key: a["demand_tokens_per_second"] for key, a in placement["adapters"].items()}
    for key in sorted(demand, key=lambda key: (-demand[key], key)):
        tenant, _, digest = key.partition("/")
        loaded = [group["group"] for group in placement["groups"] if key in group["resident"]]
        yield (
            tenants.get(tenant, tenant),
            digest[:_DIGEST_CHARS],
            f"{demand[key]:.1f}",
            ", ".join(placement["adapters"][key]["groups"]) or "-",
            ", ".join(loaded) or "-",
        )
