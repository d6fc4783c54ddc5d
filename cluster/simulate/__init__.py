"""A deterministic simulator of worker groups that runs the policy code of the live system."""

from .baselines import HashLru, RayMultiplex, TwoChoices
from .dynamo import Dynamo
from .generate import Workload, generate
from .hardware import Hardware
from .loraplex import Loraplex
from .simulation import Outcome, SimulationError, simulate
from .summary import Summary, summarize
from .trace import Trace, TraceError, load_trace, save_trace

__all__ = [
    "Dynamo",
    "Hardware",
    "HashLru",
    "Loraplex",
    "Outcome",
    "RayMultiplex",
    "SimulationError",
    "Summary",
    "Trace",
    "TraceError",
    "TwoChoices",
    "Workload",
    "generate",
    "load_trace",
    "save_trace",
    "simulate",
    "summarize",
]
