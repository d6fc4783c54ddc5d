"""All checks in order, quick ones first."""

from __future__ import annotations

from collections.abc import Iterator

from ..settings import Settings
from ..settings_sources import unknown_variables
from .check import Check, guarded
from .gpus import look_at_gpus
from .machine import look_at_machine
from .model import look_at_model
from .store import look_at_store


def examine(settings: Settings) -> Iterator[Check]:
    """Looks at everything that a service with these settings needs on this machine. Starts nothing,
    and leaves nothing behind."""
    yield from guarded("settings", lambda: _settings(settings))
    for name, look in (
        ("machine", look_at_machine),
        ("gpu", look_at_gpus),
        ("store", look_at_store),
        ("model", look_at_model),
    ):
        yield from guarded(name, lambda look=look: look(settings))


def _settings(settings: Settings) -> Iterator[Check]:
    unknown = unknown_variables(Settings.model_fields)
    if unknown:
        advice = "correct or unset them; `loraplex config` lists the settings"
        yield Check("settings", "warn", f"nothing reads {', '.join(unknown)}", advice)
    else:
        count = len(settings.model_fields_set)
        yield Check("settings", "ok", f"{count} given, the others by default")
