"""Builds the shared layers from a checkpoint, cut to this rank's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import MoeRunner, MoeWeights
from ..comm import Comm
from ..config import ModelConfig
from ..layers import Attention, MoeBlock, QkNorm, SharedExpert
from ..shard import Shard
from ..weights import TensorSource

# One expert's projections (gate, up, down) in a checkpoint with a tensor for each.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Loader:
    """What a family needs to build its layers."""

    config: ModelConfig
    shard: Shard
    checkpoint: TensorSource
    comm: Comm
    runner: MoeRunner

    def attention(self, prefix: str, norm: QkNorm | None) -> Attention:
        """Attention whose tensors' names begin with `prefix`."""
        ck, shard, m = self.checkpoint, self.shard, self.config
        q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        qkv, biases = [], []
        for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            rows = slice(*shard.rows(name))
            qkv.append(ck.get(f"{prefix}{name}.weight", (out, m.hidden_size), rows))
            if m.qkv_bias:
                biases.append(ck.get(f"{prefix}{name}.bias", (out,), rows))
        cols = slice(*shard.rows("o_proj"))
        return Attention(
            shard=shard,
            comm=self.comm,
            qkv=torch.cat(qkv),
            qkv_bias=torch.cat(biases) if biases else None,
            o=ck.get(f"{prefix}o_proj.weight", (m.hidden_size, q), cols=cols),
            norm=norm,
        )

    def moe(
        self,
        prefix: str,
        projections: tuple[str, str, str] = PROJECTIONS,
        shared: SharedExpert | None = None,
    ) -> MoeBlock:
        """Routed experts and their router, `<prefix>experts` and `<prefix>gate`."""
        m, mine = self.config, self.shard.experts
        router = self.checkpoint.get(f"{prefix}gate.weight", (m.num_experts, m.hidden_size))
        local_ids = None
        if len(mine) < m.num_experts:
            local_ids = torch.full((m.num_experts,), -1, dtype=torch.int32)
            local_ids[mine.start : mine.stop] = torch.arange(len(mine), dtype=torch.int32)
            local_ids = local_ids.to(router.device)
        return MoeBlock(
            comm=self.comm,
            runner=self.runner,
            router=router,
            experts=self._experts(f"{prefix}experts.", projections),
            top_k=m.top_k,
            norm_topk_prob=m.norm_topk_prob,
            shared=shared,
            local_ids=local_ids,
        )

    def shared_expert(self, prefix: str) -> SharedExpert:
        """`<prefix>shared_expert` and its gate, `<prefix>shared_expert_gate`."""
        ck, p = self.checkpoint, f"{prefix}shared_expert."
        hidden, inter = self.config.hidden_size, self.config.shared_expert_size
        part = slice(*self.shard.rows("shared_expert.gate_proj"))
        gate, up = (
            ck.get(f"{p}{name}.weight", (inter, hidden), part) for name in ("gate_proj", "up_proj")
        )
        return SharedExpert(
            gate_up=torch.cat([gate, up]),
            down=ck.get(f"{p}down_proj.weight", (hidden, inter), cols=part),
            gate=ck.get(f"{prefix}shared_expert_gate.weight", (1, hidden)),
        )

    def _experts(self, prefix: str, projections: tuple[str, str, str]) -> MoeWeights:
        """This rank's, from one tensor per expert and projection, or from fused tensors."""
        ck, m, mine = self.checkpoint, self.config, self.shard.experts
        hidden, inter = m.hidden_size, m.moe_intermediate_size
        lo, hi = self.shard.intermediate_rows()
        part = slice(lo, hi)
        if prefix + "gate_up_proj" in ck:
            rows = slice(mine.start, mine.stop)
            fused = (m.num_experts, 2 * inter, hidden)
            gate_up = [
                ck.get(prefix + "gate_up_proj", fused, rows, slice(first + lo, first + hi))
                for first in (0, inter)
            ]
            down = ck.get(prefix + "down_proj", (m.num_experts, hidden, inter), rows, depth=part)
            return MoeWeights(torch.cat(gate_up, dim=1), down)
        gate, up, down = projections
        w13, w2 = [], []
        for e in mine:
            for name in (gate, up):
                w13.append(ck.get(f"{prefix}{e}.{name}.weight", (inter, hidden), part))
            w2.append(ck.get(f"{prefix}{e}.{down}.weight", (hidden, inter), cols=part))
        return MoeWeights(torch.cat(w13).view(len(mine), -1, hidden), torch.stack(w2))
