"""Tensors in, tensors out: the MoE layer and the dense projections with many LoRA adapters."""

from . import torch_backend
from .align import AlignedBatch, moe_lora_align_block_size
from .dense_lora import lora_linear_
from .lora_batch import DenseSegments, LoraBatch
from .lora_tables import FUSED_GATE_UP, SHARED_A13, SHARED_B2, DenseLoraTables, ExpertLoraTables
from .moe import fused_moe
from .reference import (
    Factors,
    align_reference,
    gather_dense_factors,
    gather_factors,
    lora_linear_reference,
    moe_reference,
)
from .runner import MoeBackend, MoeRunner

__all__ = [
    "FUSED_GATE_UP",
    "SHARED_A13",
    "SHARED_B2",
    "AlignedBatch",
    "DenseLoraTables",
    "DenseSegments",
    "ExpertLoraTables",
    "Factors",
    "LoraBatch",
    "MoeBackend",
    "MoeRunner",
    "align_reference",
    "fused_moe",
    "gather_dense_factors",
    "gather_factors",
    "lora_linear_",
    "lora_linear_reference",
    "moe_lora_align_block_size",
    "moe_reference",
    "torch_backend",
]
