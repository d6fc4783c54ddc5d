"""Options that several commands share, and the connection they describe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ClusterError

if TYPE_CHECKING:
    from .cli_client import Client
    from .settings import Settings

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="The service [LORAPLEX_URL; http://127.0.0.1:8000]", show_default=False
    ),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Your key [LORAPLEX_KEY]", show_default=False)
]

Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings [LORAPLEX_CONFIG]", show_default=False),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as name=value; repeatable", show_default=False),
]


class KeyMissing(ClusterError):
    """The command needs a key and none was given."""


def connect(url: str | None, key: str | None) -> Client:
    """Raises KeyMissing when neither the option nor the environment has a key."""
    from .cli_client import DEFAULT_URL, Client

    key = key or os.environ.get("LORAPLEX_KEY")
    if not key:
        raise KeyMissing(
            "no key is given: use --key or LORAPLEX_KEY. `loraplex up` prints the demo's keys and "
            "writes them to .loraplex/demo.json"
        )
    return Client(url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL, key)


def load_settings(
    config: Path | None, assignments: list[str] | None = None, **flags: Any
) -> Settings:
    """Settings of flags, `--set`, environment, file and defaults. Raises SettingsError."""
    from .settings import Settings
    from .settings_sources import parse_assignments

    given = {name: value for name, value in flags.items() if value is not None}
    return Settings.load(config, **{**parse_assignments(assignments or ()), **given})
