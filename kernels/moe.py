"""The whole MoE layer as one call."""

from __future__ import annotations

import torch

from .checks import check
from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables
from .runner import MoeRunner

_RUNNER = MoeRunner()


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    lora: ExpertLoraTables | None = None,
    token_slot: LoraBatch | torch.Tensor | None = None,
) -> torch.Tensor:
    """MoE feed-forward with SwiGLU experts and each token's own LoRA adapter.

    Args:
        x: [T, H].
        w13: [E, 2I, H], gate rows first.
        w2: [E, H, I].
        topk_weights: float32 [T, K], routing weights.
        topk_ids: int32 or int64 [T, K], -1 = not on this rank.
        lora: adapter factors of this layer; None = base model only.
        token_slot: slot of each token: a LoraBatch made once a step, or int32 [T] with -1 = base
            model. None = base model only.

    Returns:
        [T, H] in x's dtype. Under TP or EP, this rank's part of the sum.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check("x", x, shape=(None, None))
    check("w13", w13, shape=(None, None, x.shape[1]))
    check("w2", w2, shape=(w13.shape[0], x.shape[1], None))
    if lora is None:
        lora_batch = None
    elif isinstance(token_slot, torch.Tensor):
        lora_batch = LoraBatch.from_token_slot(token_slot)
    else:
        lora_batch = token_slot
    return _RUNNER(x, w13, w2, topk_weights, topk_ids, lora, lora_batch)
