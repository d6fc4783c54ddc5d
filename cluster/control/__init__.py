"""The controller: which groups hold which adapters. Its Ray actor is in `actor`, which alone
imports Ray."""

from .controller import Controller, ControllerConfig
from .demand import DemandTracker
from .placement import plan
from .plan import Move, PlacementConfig, Plan
from .table import GroupEntry, RoutingTable

__all__ = [
    "Controller",
    "ControllerConfig",
    "DemandTracker",
    "GroupEntry",
    "Move",
    "PlacementConfig",
    "Plan",
    "RoutingTable",
    "plan",
]
