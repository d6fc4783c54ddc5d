"""Metrics: declared once, exported by every process, merged on the admin side."""

from .catalogue import CONTROLLER, ENGINE, GATEWAY, METRICS, OTHER, Metric
from .controller import ControllerMetrics
from .engine import EngineMetrics, adapter_labels
from .fan_in import Target, fan_in, http_sd, merge
from .gateway import GatewayMetrics
from .instruments import new_registry
from .listener import MetricsServer, serve_metrics, serve_routes

__all__ = [
    "CONTROLLER",
    "ENGINE",
    "GATEWAY",
    "METRICS",
    "OTHER",
    "ControllerMetrics",
    "EngineMetrics",
    "GatewayMetrics",
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
