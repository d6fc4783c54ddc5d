"""Softmax and top-k of the router's logits in one launch: a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import USE_PDL, next_power_of_2, pdl_launch_dependents, pdl_wait


@triton.jit
def softmax_topk_kernel(
    logits, padding, weights, ids, num_experts, stride,
    TOP_K: tl.constexpr, KP: tl.constexpr, EXPERTS: tl.constexpr, RENORMALISE: tl.constexpr,
    PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weights and ids [T, TOP_K] of a program's token. Of equal logits the first expert's counts
    as larger."""
    pdl_wait(PDL)
    pdl_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    row = logits + token * stride + expert
    left = tl.load(row, mask=inside, other=float("-inf")).to(tl.float32)
    k = tl.arange(0, KP)
    chosen = tl.zeros([KP], tl.int32)
    values = tl.full([KP], float("-inf"), tl.float32)
    largest = tl.max(left, 0)
    whole = tl.sum(tl.exp(left - largest), 0)
    for nth in tl.static_range(TOP_K):
        value, best = tl.max(left, 0, return_indices=True)
        chosen = tl.where(k == nth, best, chosen)
        values = tl.where(k == nth, value, values)
        left = tl.where(expert == best, float("-inf"), left)
    weight = tl.exp(values - largest)
    weight /= tl.sum(weight, 0) if RENORMALISE else whole
    chosen = tl.minimum(chosen, num_experts - 1)  # also where a row is NaN all over
    if PADDED:
        chosen = tl.where(tl.load(padding + token) != 0, -1, chosen)
    place = token * TOP_K + k
    tl.store(weights + place, weight, mask=k < TOP_K)
    tl.store(ids + place, chosen, mask=k < TOP_K)


def softmax_topk(
    logits: torch.Tensor, top_k: int, renormalise: bool, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.softmax_topk` on a GPU. Arguments are taken as checked."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    if num_tokens:
        softmax_topk_kernel[(num_tokens,)](
            logits, ids if padding is None else padding.contiguous().view(torch.uint8),
            weights, ids, num_experts, logits.stride(0),
            TOP_K=top_k, KP=next_power_of_2(top_k), EXPERTS=next_power_of_2(num_experts),
            RENORMALISE=renormalise, PADDED=padding is not None, PDL=USE_PDL,
            num_warps=1 if num_experts <= 256 else 2, launch_pdl=USE_PDL,
        )  # fmt: skip
    return weights, ids
