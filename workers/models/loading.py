"""Builds the shared layers from a checkpoint, cut to this rank's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import MoeRunner, MoeWeights
from ..comm import Comm
from ..config import ModelConfig
from ..layers.blocks import Attention, DenseBlock, Mlp, MoeBlock, QkNorm
from ..layers.routing import Routing, SoftmaxRouting
from ..shard import Shard
from ..weights import TensorSource
from .fp8 import has_fp8_experts, load_fp8_experts

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
        q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        qkv, biases, o_bias = [], [], None
        for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            rows = slice(*shard.rows(name))
            qkv.append(ck.get(f"{prefix}{name}.weight", (out, m.hidden_size), rows))
            if m.qkv_bias:
                biases.append(ck.get(f"{prefix}{name}.bias", (out,), rows))
        if m.o_bias and shard.rank == 0:
            o_bias = ck.get(f"{prefix}o_proj.bias", (m.hidden_size,))
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
        shared: Mlp | None = None,
        routing: Routing | None = None,
        router_dtype: torch.dtype | None = None,
    ) -> MoeBlock:
        """Routed experts and their router, `<prefix>experts` and `<prefix>gate`.

        Args:
            routing: by softmax over all experts when None.
            router_dtype: that of the model when None.
        """
        m = self.config
        router = (m.num_experts, m.hidden_size)
        return MoeBlock(
            comm=self.comm,
            runner=self.runner,
            router=self.checkpoint.get(f"{prefix}gate.weight", router, dtype=router_dtype),
            experts=self._experts(f"{prefix}experts.", projections),
            routing=routing or SoftmaxRouting(m.top_k, m.norm_topk_prob),
            shared=shared,
            local_ids=self.local_ids(),
        )

    def mlp(self, prefix: str, target: str, gate: str | None = None) -> Mlp:
        """`<prefix>gate_proj`, `up_proj` and `down_proj`.

        Args:
            target: what adapters call the module.
            gate: name of the tensor that weighs the output.
        """
        ck, m = self.checkpoint, self.config
        hidden, inter = m.hidden_size, m.dense_size if target == "mlp" else m.shared_expert_size
        part = slice(*self.shard.rows(f"{target}.gate_proj"))
        gate_up = [
            ck.get(f"{prefix}{name}.weight", (inter, hidden), part) for name in PROJECTIONS[:2]
        ]
        return Mlp(
            gate_up=torch.cat(gate_up),
            down=ck.get(f"{prefix}down_proj.weight", (hidden, inter), cols=part),
            gate=ck.get(gate, (1, hidden)) if gate else None,
        )

    def dense(self, prefix: str) -> DenseBlock:
        """The MLP of a layer without experts."""
        return DenseBlock(self.comm, self.mlp(prefix, "mlp"))

    def _experts(self, prefix: str, projections: tuple[str, str, str]) -> MoeWeights:
        """This rank's, from one tensor per expert and projection, or from fused tensors."""
        ck, m, mine = self.checkpoint, self.config, self.shard.experts
        if m.quantisation == "fp8" and has_fp8_experts(ck, prefix, projections[0], mine[0]):
            return load_fp8_experts(ck, m, self.shard, prefix, projections)
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
