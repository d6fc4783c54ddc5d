"""`loraplex doctor`: what this machine, its GPUs, the store and the model are fit for."""

from .check import Check, Verdict
from .examine import examine

__all__ = ["Check", "Verdict", "examine"]
