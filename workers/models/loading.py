"""Builds the shared layers from a checkpoint, cut to this rank's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import MoeRunner, MoeWeights
from ..comm import Comm
from ..config import ModelConfig
from ..layers import Attention, DenseBlock, Mlp, MoeBlock, QkNorm
from ..routing import Routing, SoftmaxRouting
from ..shard import Shard
from ..weights import Checkpoint

# One expert's projections (gate, up, down) in a checkpoint with a tensor for each.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Loader:
    """What a family needs to build its layers."""

    config: ModelConfig
    shard: Shard
    checkpoint: Checkpoint
    comm: Comm
    runner: MoeRunner

    def attention(self, n: int, norm: QkNorm | None) -> Attention:
        """The attention of layer `n`, without sinks."""
        ck, shard, bias = self.checkpoint, self.shard, self.config.qkv_bias
        prefix = f"model.layers.{n}.self_attn."
        o_bias = None
        if self.config.o_bias and shard.rank == 0:
            o_bias = ck.get(f"{prefix}o_proj.bias")
        names = ("q_proj", "k_proj", "v_proj")
        rows = {name: slice(*shard.rows(name)) for name in names}
        qkv = [ck.get(f"{prefix}{name}.weight", rows=rows[name]) for name in names]
        biases = [ck.get(f"{prefix}{name}.bias", rows=rows[name]) for name in names if bias]
        o = ck.get(f"{prefix}o_proj.weight", cols=slice(*shard.rows("o_proj")))
        return Attention(
            shard=shard,
            comm=self.comm,
            qkv=torch.cat(qkv),
            qkv_bias=torch.cat(biases) if bias else None,
            o=o.contiguous(),
            o_bias=o_bias,
            norm=norm,
            window=self.config.layer_windows[n],
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
        return MoeBlock(
            comm=self.comm,
            runner=self.runner,
            router=self.checkpoint.get(f"{prefix}gate.weight", dtype=router_dtype),
            experts=self._experts(f"{prefix}experts.", projections),
            routing=routing or SoftmaxRouting(m.top_k, m.norm_topk_prob),
            shared=shared,
        )

    def mlp(self, prefix: str, target: str, gate: str | None = None) -> Mlp:
        """`<prefix>gate_proj`, `up_proj` and `down_proj`.

        Args:
            target: what adapters call the module.
            gate: name of the tensor that weighs the output.
        """
        ck, part = self.checkpoint, slice(*self.shard.rows(f"{target}.gate_proj"))
        gate_up = [ck.get(f"{prefix}{name}.weight", rows=part) for name in PROJECTIONS[:2]]
        return Mlp(
            gate_up=torch.cat(gate_up),
            down=ck.get(f"{prefix}down_proj.weight", cols=part).contiguous(),
            gate=ck.get(gate) if gate else None,
        )

    def dense(self, prefix: str) -> DenseBlock:
        """The MLP of a layer without experts."""
        return DenseBlock(self.comm, self.mlp(prefix, "mlp"))

    def _experts(self, prefix: str, projections: tuple[str, str, str]) -> MoeWeights:
        """From one tensor per expert and projection, or from fused tensors."""
        ck = self.checkpoint
        lo, hi = self.shard.intermediate_rows()
        if prefix + "gate_up_proj" in ck:
            whole = self.config.moe_intermediate_size
            w13 = ck.get(prefix + "gate_up_proj")
            w13 = torch.cat([w13[:, lo:hi], w13[:, whole + lo : whole + hi]], dim=1)
            down = ck.get(prefix + "down_proj")[:, :, lo:hi]
            return MoeWeights(w13.contiguous(), down.contiguous())
        gate, up, down = projections
        w13, w2 = [], []
        for e in range(self.config.num_experts):
            w13.append(
                torch.cat(
                    [ck.get(f"{prefix}{e}.{p}.weight", rows=slice(lo, hi)) for p in (gate, up)]
                )
            )
            w2.append(ck.get(f"{prefix}{e}.{down}.weight", cols=slice(lo, hi)))
        return MoeWeights(torch.stack(w13), torch.stack(w2))
