"""FP8 weights as DeepSeek-V3 and Qwen3-*-FP8 are published: e4m3 with a float32 scale for each
block of 128 x 128 elements. What an element means is its own value times its block's scale."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128  # rows, and columns, that share a scale


def fp8_blocks(size: int) -> int:
    """Blocks along `size` rows or columns; the last one may be cut short."""
    return -(-size // FP8_BLOCK)


def dequantise_fp8(
    codes: torch.Tensor, scale: torch.Tensor, first_row: int = 0, first_column: int = 0
) -> torch.Tensor:
    """What FP8 weights mean.

    Args:
        codes: e4m3 [..., R, C], from `first_row` and `first_column` of a whole matrix.
        scale: float32 [..., blocks, blocks], of the blocks that these meet.

    Returns:
        float32 [..., R, C]
    """

    def spread(first: int, size: int) -> torch.Tensor:
        """The block of each row or column, counted from the first one."""
        place = torch.arange(first % FP8_BLOCK, first % FP8_BLOCK + size, device=codes.device)
        return place // FP8_BLOCK

    rows, columns = spread(first_row, codes.shape[-2]), spread(first_column, codes.shape[-1])
    return codes.float() * scale.index_select(-2, rows).index_select(-1, columns)
