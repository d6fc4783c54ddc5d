"""The Triton kernels, for GPUs (and, slowly, for Triton's interpreter on CPUs)."""

from .add_rms_norm import add_rms_norm_
from .align import align
from .draw import draw
from .fused import FusedBackend
from .hooked import HookedBackend
from .least_kept import least_kept
from .lora import lora_linear, lora_linear_
from .paged_attention import paged_attention, write_kv
from .qkv_prepare import qkv_prepare
from .scatter_pieces import scatter_pieces_
from .softmax_topk import softmax_topk
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
    "add_rms_norm_",
    "align",
    "draw",
    "least_kept",
    "lora_linear",
    "lora_linear_",
    "paged_attention",
    "qkv_prepare",
    "scatter_pieces_",
    "softmax_topk",
    "write_kv",
]
