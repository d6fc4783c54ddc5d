"""The whole MoE layer as one call."""

from __future__ import annotations

import torch

from .backends import backend_for
from .checks import check
from .lora_batch import LoraBatch
from .lora_tables import ExpertLoraTables
from .moe_weights import ClampedSwiglu, MoeWeights
from .runner import MoeRunner


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    lora: ExpertLoraTables | None = None,
    token_slot: LoraBatch | torch.Tensor | None = None,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: ClampedSwiglu | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """MoE feed-forward with SwiGLU experts and each token's own LoRA adapter.

    Args:
        x: [T, H].
        w13: [E, 2I, H], gate rows first; in x's dtype, or FP8 (e4m3).
        w2: [E, H, I], as w13.
        topk_weights: float32 [T, K], routing weights.
        topk_ids: int32 or int64 [T, K], -1 = not on this rank.
        lora: adapter factors of this layer; None = base model only.
        token_slot: slot of each token: a LoraBatch made once a step, or int32 [T] with -1 = base
            model. None = base model only.
        w13_bias: [E, 2I], or None.
        w2_bias: [E, H], or None. Under TP give it to one rank only.
        clamped: gpt-oss's activation in place of silu(gate) * up.
        w13_scale: float32 [E, 2I / 128, H / 128], rounded up: the scale of each block of FP8
            weights; None = they aren't FP8.
        w2_scale: float32 [E, H / 128, I / 128], likewise.

    Returns:
        [T, H] in x's dtype. Under TP or EP, this rank's part of the sum.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    weights = MoeWeights(w13, w2, w13_bias, w2_bias, clamped, w13_scale, w2_scale)
    weights.check(x)
    check("topk_ids", topk_ids, shape=(x.shape[0], None), device=x.device)
    check("topk_weights", topk_weights, shape=tuple(topk_ids.shape), device=x.device)
    lora_batch = None
    if lora is not None:
        if isinstance(token_slot, torch.Tensor):
            lora_batch = LoraBatch.from_token_slot(token_slot)
        else:
            lora_batch = token_slot
    runner = MoeRunner(backend_for(x.device))
    return runner(x, weights, topk_weights, topk_ids, lora, lora_batch)
