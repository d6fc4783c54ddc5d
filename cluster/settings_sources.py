"""Where settings come from: arguments, `LORAPLEX_*` variables, a TOML file, defaults.

The first that says something wins. pydantic-settings merges them; this module reads the file and
remembers who said what, for `loraplex config` and for errors.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SettingsError

ENV_PREFIX = "LORAPLEX_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
# What isn't a setting but is read: the file's place, and the command line's own.
_OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, ENV_PREFIX + "URL", ENV_PREFIX + "KEY"})


@dataclass(frozen=True)
class Sources:
    """What each source says, before anything is checked.

    Args:
        arguments: given by the caller, that is, by flags.
        file: the file's table; `path` is its place, None without one.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    file: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def origin(self, name: str) -> str:
        """Who decides the setting: "flag", a variable's name, the file's path, or "default"."""
        if name in self.arguments:
            return "flag"
        if os.environ.get(variable_of(name)):
            return variable_of(name)
        if name in self.file:
            return str(self.path)
        return "default"

    def label(self, name: str) -> str:
        """How an error names the setting, so that its user finds the place to change."""
        origin = self.origin(name)
        if origin in ("flag", "default"):
            return name
        return origin if origin == variable_of(name) else f"{origin}: {name}"


def read_sources(config: Path | None, arguments: Mapping[str, Any]) -> Sources:
    """
    Args:
        config: the TOML file; None: LORAPLEX_CONFIG's, if that is set.
        arguments: None stands for not given.

    Raises:
        SettingsError: the file is missing or isn't TOML.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    flag = config is not None
    if config is None and (variable := os.environ.get(CONFIG_VARIABLE)):
        config = Path(variable)
    if config is None:
        return Sources(given)
    where = f"--config {config}" if flag else f"{CONFIG_VARIABLE}={config}"
    try:
        table = tomllib.loads(config.read_text())
    except OSError as error:
        raise SettingsError(
            f"{where}: the settings file can't be read: {error.strerror or error}. Name a TOML "
            "file with lines like port = 9000"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f'{where}: this isn\'t TOML: {error}. Lines look like port = 9000 or host = "127.0.0.1"'
        ) from None
    return Sources(given, table, config)


def variable_of(name: str) -> str:
    return ENV_PREFIX + name.upper()


def unknown_variables(names: Iterable[str]) -> list[str]:
    """`LORAPLEX_*` variables that are set and that nothing reads: most likely misspelt."""
    known = {variable_of(name) for name in names} | _OTHER_VARIABLES
    return sorted(v for v in os.environ if v.startswith(ENV_PREFIX) and v not in known)


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Arguments from "name=value" texts, as `--set` takes them; "LORAPLEX_NAME=value" is one, too.

    Raises:
        SettingsError: a text has no "=".
    """
    values = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: must look like name=value, as in port=9000")
        values[name.strip().removeprefix(ENV_PREFIX).lower().replace("-", "_")] = value
    return values
