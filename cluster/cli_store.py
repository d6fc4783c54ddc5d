"""`loraplex store`: the object store looked at, mended and copied out, past any service."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .cli_options import Assignments, Config, load_settings
from .errors import ClusterError

if TYPE_CHECKING:
    from ..adapter_store import BaseModel, Finding
    from .settings import Settings

store_app = typer.Typer(
    help="The object store itself, past any service: check, repair, export, admin key.",
    no_args_is_help=True,
)

Store = Annotated[
    str | None,
    typer.Option("--store", help="s3://bucket/prefix [LORAPLEX_STORE_URL; the data folder's own]"),
]
DataFolder = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of the embedded store [.loraplex]")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="The served base model: sources' digests are computed, packs remade"
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", help="What the base model is called [its folder's name]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]


class UnknownTenant(ClusterError):
    """No tenant has this name or id."""


class AdminKeyExists(ClusterError):
    """The admin key was made before; only its hash is kept."""


@store_app.command()
def check(
    store: Store = None,
    data_dir: DataFolder = None,
    model: Model = None,
    name: Name = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that objects are there, without reading them")
    ] = False,
    as_json: Json = False,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Compare what is stored with what the catalogues promise; exit code 1 if anything is wrong."""
    from ..adapter_store import Catalogue, check_store
    from .store_access import open_store

    settings = _settings(config, assignments, store, data_dir, model, name)
    with open_store(settings) as opened:
        found = list(
            check_store(
                opened,
                Catalogue(opened),
                settings.scratch_dir,
                _base(settings),
                contents=not quick,
            )
        )
    if as_json:
        print(json.dumps([_finding_json(f) for f in found], indent=2))
    else:
        for finding in found:
            _line(f"{finding.kind}: {finding.key}: {finding.message}")
        counts = Counter(f.kind for f in found)
        _line(", ".join(f"{n} {kind}" for kind, n in counts.items()) or "nothing is wrong")
    raise typer.Exit(1 if found else 0)


@store_app.command()
def repair(
    store: Store = None,
    data_dir: DataFolder = None,
    model: Model = None,
    name: Name = None,
    older_than_hours: Annotated[
        float, typer.Option(min=1.0, help="What no version names is removed from this age on")
    ] = 24.0,
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it; without, only what would be done is shown")
    ] = False,
    as_json: Json = False,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Remake packs from their sources, remove old orphans; never what a catalogue names.

    Exit code 1 if something is left that needs you.
    """
    from ..adapter_store import Catalogue, Publisher, carry_out, check_store, plan_repairs
    from .store_access import open_store

    settings = _settings(config, assignments, store, data_dir, model, name)
    base = _base(settings)
    with open_store(settings) as opened:
        catalogue = Catalogue(opened)
        found = check_store(opened, catalogue, settings.scratch_dir, base)
        repairs = plan_repairs(
            found,
            can_remake=base is not None,
            older_than_s=older_than_hours * 3600,
            urls_live_s=settings.presigned_expires_s,
        )
        if apply:
            scratch = settings.scratch_dir
            publisher = Publisher(opened, catalogue, base, scratch) if base else None
            repairs = list(carry_out(repairs, opened, catalogue, publisher))
    if as_json:
        rows = [
            {**_finding_json(r.finding), "plan": r.plan, "reason": r.reason, "applied": apply}
            for r in repairs
        ]
        print(json.dumps(rows, indent=2))
    else:
        done = {"remake": "remade", "remove": "removed", "leave": "left"}
        for item in repairs:
            what = done[item.plan] if apply else item.plan
            why = f" ({item.reason})" if item.reason else ""
            _line(f"{what}{why}: {item.finding.kind} {item.finding.key}")
        if not repairs:
            _line("nothing is wrong")
        elif not apply:
            _line("nothing was changed: --apply does it")
    needs_you = any(
        r.plan == "leave" and r.finding.kind not in ("orphan_blob", "abandoned_upload")
        for r in repairs
    )
    raise typer.Exit(1 if needs_you else 0)


@store_app.command()
def export(
    tenant: Annotated[str, typer.Argument(help="The tenant's name or id", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where to write", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="Only this one; repeatable")
    ] = None,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Every kept version, as NAME@VERSION")
    ] = False,
    packs: Annotated[
        bool, typer.Option("--packs", help="The packed files instead of PEFT folders")
    ] = False,
    store: Store = None,
    data_dir: DataFolder = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Write a tenant's adapters to a folder, as PEFT saved them."""
    from ..adapter_store import Catalogue, export_adapters
    from .store_access import open_store

    settings = _settings(config, assignments, store, data_dir, None, None)
    with open_store(settings) as opened:
        catalogue = Catalogue(opened)
        found = [t.id for t in catalogue.list_tenants() if tenant in (t.id, t.name)]
        if not found:
            raise UnknownTenant(f"there is no tenant {tenant!r}; `loraplex tenants list` has them")
        for path in export_adapters(
            opened,
            catalogue,
            found[0],
            folder,
            adapters or (),
            all_versions=all_versions,
            packs=packs,
        ):
            _line(str(path))


@store_app.command("admin-key")
def admin_key(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the old one stops working")
    ] = False,
    store: Store = None,
    data_dir: DataFolder = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Make the admin key of a service and show it, this once."""
    from ..adapter_store import Catalogue
    from .store_access import open_store

    settings = _settings(config, assignments, store, data_dir, None, None)
    with open_store(settings) as opened:
        made = Catalogue(opened).ensure_admin_key(rotate=rotate)
    if made is None:
        raise AdminKeyExists("there is an admin key already; --rotate makes another and ends it")
    print(made)


def _settings(
    config: Path | None,
    assignments: list[str] | None,
    store: str | None,
    data_dir: Path | None,
    model: str | None,
    name: str | None,
) -> Settings:
    return load_settings(
        config,
        assignments,
        store_url=store,
        data_dir=data_dir,
        model_path=model,
        served_model_name=name,
    )


def _base(settings: Settings) -> BaseModel | None:
    from .model import base_model

    return base_model(settings) if settings.model_path is not None else None


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "tenant": finding.tenant_id,
        "key": finding.key,
        "message": finding.message,
        "modified": finding.modified.isoformat() if finding.modified else None,
    }


def _line(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(escape(text))
