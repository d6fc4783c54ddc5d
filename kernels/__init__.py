"""Tensors in, tensors out: the MoE layer and the dense projections with many LoRA adapters,
attention over a paged KV cache, and what sampling asks of a vocabulary's logits."""

from .align import moe_lora_align_block_size
from .aligned import AlignedBatch, BlockSegments
from .attention import paged_attention, write_kv
from .backends import backend_for
from .block_fp8 import FP8, FP8_BLOCK, dequantise_fp8, fp8_blocks
from .dense_lora import lora_linear, lora_linear_
from .draw import draw
from .least_kept import least_kept
from .lora_batch import TUNED_ADAPTERS, LoraBatch
from .lora_tables import (
    FUSED_GATE_UP,
    MAX_RANK,
    SHARED_A13,
    SHARED_B2,
    DenseLoraTables,
    ExpertLoraTables,
)
from .moe import fused_moe
from .moe_weights import ClampedSwiglu, MoeWeights
from .norm import add_rms_norm_
from .paged_sequences import TILE_TOKENS, PagedSequences
from .qkv_prepare import qkv_prepare
from .reference import (
    Factors,
    align_reference,
    gather_dense_factors,
    gather_factors,
    lora_linear_reference,
    moe_reference,
    scatter_pieces_reference,
)
from .runner import MoeBackend, MoeRunner
from .scatter_pieces import PIECE_FIELDS, scatter_pieces_
from .softmax_topk import softmax_topk
from .torch_backend import TorchBackend

__all__ = [
    "FP8",
    "FP8_BLOCK",
    "FUSED_GATE_UP",
    "MAX_RANK",
    "PIECE_FIELDS",
    "SHARED_A13",
    "SHARED_B2",
    "TILE_TOKENS",
    "TUNED_ADAPTERS",
    "AlignedBatch",
    "BlockSegments",
    "ClampedSwiglu",
    "DenseLoraTables",
    "ExpertLoraTables",
    "Factors",
    "LoraBatch",
    "MoeBackend",
    "MoeRunner",
    "MoeWeights",
    "PagedSequences",
    "TorchBackend",
    "add_rms_norm_",
    "align_reference",
    "backend_for",
    "dequantise_fp8",
    "draw",
    "fp8_blocks",
    "fused_moe",
    "gather_dense_factors",
    "gather_factors",
    "least_kept",
    "lora_linear",
    "lora_linear_",
    "lora_linear_reference",
    "moe_lora_align_block_size",
    "moe_reference",
    "paged_attention",
    "qkv_prepare",
    "scatter_pieces_",
    "scatter_pieces_reference",
    "softmax_topk",
    "write_kv",
]
