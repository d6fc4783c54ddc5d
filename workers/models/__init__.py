"""Model families, one file each."""

from .qwen3_moe import Qwen3Moe

__all__ = ["Qwen3Moe"]
