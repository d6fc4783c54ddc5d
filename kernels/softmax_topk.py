"""The router's choice: the likeliest experts of each token, and how much each counts."""

from __future__ import annotations

import torch

from .checks import check


def softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    renormalise: bool,
    padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k likeliest experts by softmax, likeliest first. In one launch on a GPU.

    Args:
        logits: [T, E]
        renormalise: divide each token's weights by their sum.
        padding: bool [T, 1], rows that stand for no token: their experts become -1.

    Returns:
        weights float32 [T, top_k] and expert ids int32 [T, top_k].

    Raises:
        ValueError: a shape or dtype doesn't fit; the message names the argument.
    """
    check("logits", logits, shape=(None, None))
    num_tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to {num_experts}, the experts, got {top_k}")
    if padding is not None:
        check("padding", padding, shape=(num_tokens, 1), dtype=(torch.bool,))
    if logits.device.type == "cuda":
        from .gpu import softmax_topk as on_gpu

        return on_gpu(logits, top_k, renormalise, padding)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    ids = ids.to(torch.int32)
    return weights, ids if padding is None else ids.masked_fill(padding, -1)
