"""Random layers to time tiles on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..block_fp8 import FP8, fp8_blocks
from ..lora_batch import LoraBatch
from ..lora_tables import ExpertLoraTables
from ..moe_weights import MoeWeights
from .tiles import MoeShape

RANK = 16
ROUTINGS = 4  # of a few tokens, so that their weights don't stay in the cache


@dataclass
class Problem:
    """Random inputs of one layer shape on this GPU."""

    shape: MoeShape
    slots: int

    def __post_init__(self) -> None:
        s = self.shape
        torch.manual_seed(0)
        device = torch.device("cuda")
        w13 = torch.empty(s.num_experts, 2 * s.intermediate, s.hidden, dtype=s.dtype, device=device)
        w2 = torch.empty(s.num_experts, s.hidden, s.intermediate, dtype=s.dtype, device=device)
        w13.normal_(std=0.02)
        w2.normal_(std=0.02)
        self.weights = _in_fp8(w13, w2) if s.fp8 else MoeWeights(w13, w2)
        self.tables = random_tables(s, self.slots, RANK)

    def calls(self, num_tokens: int, adapters: int) -> list[tuple]:
        """Arguments of the runner: x, routing, and adapters' tables and batch where there are."""
        s, calls = self.shape, []
        for _ in range(ROUTINGS if num_tokens <= 64 else 1):
            x = torch.randn(num_tokens, s.hidden, dtype=s.dtype, device="cuda")
            logits = torch.randn(num_tokens, s.num_experts, device="cuda")
            topk_weights, ids = logits.softmax(1).topk(s.top_k)
            lora: tuple = (None, None)
            if adapters:
                slot = torch.arange(num_tokens, device="cuda") * adapters // num_tokens
                lora = (self.tables, LoraBatch.from_token_slot(slot.int(), True, adapters))
            calls.append((x, self.weights, topk_weights, ids.int(), *lora))
        return calls


def _in_fp8(w13: torch.Tensor, w2: torch.Tensor) -> MoeWeights:
    scale13, scale2 = (
        torch.ones(w.shape[0], *map(fp8_blocks, w.shape[1:]), device=w.device) for w in (w13, w2)
    )
    return MoeWeights(w13.to(FP8), w2.to(FP8), w13_scale=scale13, w2_scale=scale2)


def random_tables(shape: MoeShape, slots: int, rank: int) -> ExpertLoraTables:
    """Adapters of one rank on all experts, their blocks in random order in the pool."""
    hidden, inter, experts = shape.hidden, shape.intermediate, shape.num_experts
    sizes = torch.tensor([2 * rank * hidden, 2 * inter * rank, inter * rank, hidden * rank])
    block = int(sizes.sum())
    place = torch.randperm(slots * experts).view(slots, experts) * block
    starts = sizes.cumsum(0) - sizes
    offsets = [(place + int(start)).cuda() for start in starts]
    pool = torch.empty(slots * experts * block, dtype=shape.dtype, device="cuda").normal_(std=0.05)
    shape3 = (slots, experts, 3)
    return ExpertLoraTables(
        pool,
        *offsets,
        rank=torch.full(shape3, rank, dtype=torch.int32, device="cuda"),
        scale=torch.ones(shape3, device="cuda"),
        layout=torch.zeros(slots, dtype=torch.int32, device="cuda"),
        max_rank=rank,
        rank_multiple=8,
    )
