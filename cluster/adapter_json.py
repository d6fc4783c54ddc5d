"""Adapters and versions as JSON, the same in answers, upload records and the ingest actor."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ..adapter_store import AdapterAlias, AdapterVersion


def iso_time(seconds: int) -> str:
    """Seconds since 1970 as "2026-11-23T12:00:00+00:00"."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def version_json(version: AdapterVersion) -> dict[str, Any]:
    """One version. `bytes` is the size of its pack."""
    return {
        "version": version.version,
        "digest": version.digest,
        "created": iso_time(version.created),
        "bytes": version.nbytes,
        "rank_max": version.rank_max,
        "format": version.format,
        "targets": list(version.targets),
        "status": version.status,
    }


def alias_json(alias: AdapterAlias) -> dict[str, Any]:
    """The name, its current version's fields, and all versions."""
    shown = version_json(alias.current)
    del shown["version"]
    return {
        "object": "adapter",
        "name": alias.name,
        "current_version": alias.current_version,
        **shown,
        "versions": [version_json(v) for v in alias.versions],
    }
