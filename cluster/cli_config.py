"""`loraplex config`: the settings as they would be used, and who decided each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from rich.console import Console

from .cli_tables import print_table
from .errors import SettingsError
from .settings import Settings
from .settings_sources import Sources, parse_assignments, read_sources, unknown_variables

HIDDEN = "(hidden)"


def show_settings(
    names: Sequence[str], as_json: bool, config: Path | None, assignments: Sequence[str]
) -> None:
    """Prints the settings of these names, all of them without any.

    Raises:
        SettingsError: a setting is wrong, or a name is none.
    """
    sources = read_sources(config, parse_assignments(assignments))
    rows = effective(Settings.from_sources(sources), sources)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise SettingsError(
            f"there is no setting {', '.join(unknown)}; `loraplex config` without names lists all"
        )
    rows = {name: row for name, row in rows.items() if not names or name in names}
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [(name, _text(row["value"]), row["origin"]) for name, row in rows.items()]
    print_table(Console(), ("setting", "value", "from"), table)
    for variable in unknown_variables(Settings.model_fields):
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"warning: {variable} is set, but there is no such setting"
        )


def effective(settings: Settings, sources: Sources) -> dict[str, dict[str, Any]]:
    """By name: its value as JSON has it, and its origin. Secrets are only told to be set."""
    plain = settings.model_dump(mode="json")
    return {
        name: {
            "value": HIDDEN if isinstance(getattr(settings, name), SecretStr) else plain[name],
            "origin": sources.origin(name),
        }
        for name in Settings.model_fields
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
