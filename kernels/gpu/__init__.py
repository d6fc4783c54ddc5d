"""The Triton kernels, for GPUs (and, slowly, for Triton's interpreter on CPUs)."""

from .align import align
from .fused import FusedBackend
from .hooked import HookedBackend
from .least_kept import least_kept
from .lora import lora_linear_
from .tiles import GemmTile, MoeShape, MoeTiles, ShrinkTile

FUSED = FusedBackend()

__all__ = [
    "FUSED",
    "FusedBackend",
    "GemmTile",
    "HookedBackend",
    "MoeShape",
    "MoeTiles",
    "ShrinkTile",
    "align",
    "least_kept",
    "lora_linear_",
]
