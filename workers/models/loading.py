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

    def empty(self, *shape: int) -> torch.Tensor:
        """For weights that are put together from several tensors of the checkpoint."""
        return torch.empty(shape, dtype=self.checkpoint.dtype, device=self.checkpoint.device)

    def local_ids(self) -> torch.Tensor | None:
        """What `MoeBlock.local_ids` says."""
        mine, count = self.shard.experts, self.config.num_experts
        if len(mine) == count:
            return None
        local_ids = torch.full((count,), -1, dtype=torch.int32)
        local_ids[mine.start : mine.stop] = torch.arange(len(mine), dtype=torch.int32)
        return local_ids.to(self.checkpoint.device)

    def attention(self, n: int, norm: QkNorm | None) -> Attention:
        """The attention of layer `n`, without sinks."""
        ck, shard, m = self.checkpoint, self.shard, self.config
        prefix = f"model.layers.{n}.self_attn."
        o_bias = None
        if m.o_bias and shard.rank == 0:
            o_bias = ck.get(f"{prefix}o_proj.bias", (m.hidden_size,))
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
            o_bias=o_bias,
            norm=norm,
            window=m.layer_windows[n],
        )

    def moe(
        self,
        prefix: str,
        projections: tuple[str, str, str] = PROJECTIONS,
        shared: SharedExpert | None = None,
    ) -> MoeBlock:
        """Routed experts and their router, `<prefix>experts` and `<prefix>gate`."""
        m = self.config
        return MoeBlock(
            comm=self.comm,
            runner=self.runner,
            router=self.checkpoint.get(f"{prefix}gate.weight", (m.num_experts, m.hidden_size)),
            experts=self._experts(f"{prefix}experts.", projections),
            top_k=m.top_k,
            norm_topk_prob=m.norm_topk_prob,
            shared=shared,
            local_ids=self.local_ids(),
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
        part, fused = slice(lo, hi), prefix + "gate_up_proj" in ck
        gate, up, down = projections
        w13 = self.empty(len(mine), 2, hi - lo, hidden)
        w2 = self.empty(len(mine), hidden, hi - lo)
        for n, e in enumerate(mine):
            if fused:
                only, shape = slice(e, e + 1), (m.num_experts, 2 * inter, hidden)
                for half, first in enumerate((0, inter)):
                    rows = slice(first + lo, first + hi)
                    ck.get(prefix + "gate_up_proj", shape, only, rows, into=w13[n : n + 1, half])
                shape = (m.num_experts, hidden, inter)
                ck.get(prefix + "down_proj", shape, only, depth=part, into=w2[n : n + 1])
                continue
            for half, name in enumerate((gate, up)):
                ck.get(f"{prefix}{e}.{name}.weight", (inter, hidden), part, into=w13[n, half])
            ck.get(f"{prefix}{e}.{down}.weight", (hidden, inter), cols=part, into=w2[n])
        return MoeWeights(w13.flatten(1, 2), w2)
