"""What the ingest actor measures."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from .instruments import histogram
from .store import StoreRequests


class IngestMetrics:
    """Metrics of the ingest actor. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        StoreRequests(registry)
        self._seconds = histogram("loraplex_ingest_seconds", registry)
        for result in ("published", "refused", "failed"):
            self._seconds.labels(result)

    def ended(self, result: str, seconds: float) -> None:
        """An upload was "published" or "refused", or its ingest "failed"."""
        self._seconds.labels(result).observe(seconds)
