"""Metrics: declared once, exported by every process, merged on the admin side."""

from .catalogue import CONTROLLER, ENGINE, GATEWAY, INGEST, METRICS, STORE
from .controller import ControllerMetrics
from .engine import EngineMetrics, adapter_labels
from .fan_in import Target, fan_in, http_sd, merge
from .gateway import GatewayMetrics
from .ingest import IngestMetrics
from .instruments import new_registry
from .listener import MetricsServer, serve_metrics, serve_routes
from .metric import OTHER, Metric

__all__ = [
    "CONTROLLER",
    "ENGINE",
    "GATEWAY",
    "INGEST",
    "METRICS",
    "OTHER",
    "STORE",
    "ControllerMetrics",
    "EngineMetrics",
    "GatewayMetrics",
    "IngestMetrics",
    "Metric",
    "MetricsServer",
    "Target",
    "adapter_labels",
    "fan_in",
    "http_sd",
    "merge",
    "new_registry",
    "serve_metrics",
    "serve_routes",
]
