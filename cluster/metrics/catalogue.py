"""Every metric that Loraplex exposes, declared once; exporters and dashboards follow from it."""

from __future__ import annotations

from .catalogue_controller import CONTROLLER, INGEST, STORE
from .catalogue_engine import ENGINE
from .catalogue_gateway import GATEWAY
from .metric import Metric

METRICS: dict[str, Metric] = {m.name: m for m in (*GATEWAY, *ENGINE, *CONTROLLER, *INGEST, *STORE)}
