"""A deterministic simulator of worker groups that runs the policy code of the live system.

`simulate` runs a trace against a `Policy`; `compare` runs several on the same one.
"""

from .abuse import ABUSE_POLICIES, ABUSER, Abuse, Service, compare_abuse
from .baselines import HashLru, RayMultiplex, TwoChoices
from .dynamo import Dynamo
from .floor import Floor, floor
from .generate import Workload, generate
from .hardware import Hardware, StepCosts
from .loraplex import Loraplex
from .plot import bars
from .policy import Advice, Policy
from .scenarios import POLICIES, SCENARIOS, Scenario, compare
from .simulation import Outcome, SimulationError, simulate
from .summary import Summary, summarize
from .trace import Fault, Trace, TracedAdapter, TracedRequest, TraceError, load_trace, save_trace

__all__ = [
    "ABUSER",
    "ABUSE_POLICIES",
    "POLICIES",
    "SCENARIOS",
    "Abuse",
    "Advice",
    "Dynamo",
    "Fault",
    "Floor",
    "Hardware",
    "HashLru",
    "Loraplex",
    "Outcome",
    "Policy",
    "RayMultiplex",
    "Scenario",
    "Service",
    "SimulationError",
    "StepCosts",
    "Summary",
    "Trace",
    "TraceError",
    "TracedAdapter",
    "TracedRequest",
    "TwoChoices",
    "Workload",
    "bars",
    "compare",
    "compare_abuse",
    "floor",
    "generate",
    "load_trace",
    "save_trace",
    "simulate",
    "summarize",
]
