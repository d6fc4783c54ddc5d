"""Log lines of every process: as text, or as JSON with the request's id, tenant and digest."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

# What a record may say of a request beside its message: by `extra`, or by `add_log_fields`.
FIELDS = ("request_id", "tenant", "digest", "route", "status", "seconds", "code")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_fields: ContextVar[dict[str, object] | None] = ContextVar("loraplex_log_fields", default=None)


@dataclass(frozen=True)
class LogConfig:
    """`level` is the name of one of logging's."""

    format: Literal["text", "json"] = "text"
    level: str = "INFO"


def configure_logs(config: LogConfig, component: str) -> None:
    """Sends this process's lines to stderr, where Ray collects them.

    Args:
        component: "gateway", "group", "engine", "controller" or "ingest".
    """
    # Ray Serve puts a logger of its own in place of sys.stderr, which drops what isn't a warning.
    handler = logging.StreamHandler(sys.__stderr__ or sys.stderr)
    handler.setFormatter(
        JsonFormatter(component) if config.format == "json" else TextFormatter(_TEXT)
    )
    logger = logging.getLogger("loraplex")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(config.level)


def begin_log_fields(**fields: object) -> None:
    """Starts a request: lines of this task, and of tasks that it makes, carry these fields."""
    _fields.set(fields)


def add_log_fields(**fields: object) -> None:
    """More of the request that this task works on; nothing where there is none."""
    known = _fields.get()
    if known is not None:
        known.update(fields)


def log_fields() -> dict[str, object]:
    """Of the request that this task works on."""
    return dict(_fields.get() or {})


class TextFormatter(logging.Formatter):
    """A readable line with the fields at its end."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    known = {**(_fields.get() or {}), **vars(record)}
    return {name: known[name] for name in FIELDS if known.get(name) is not None}
