"""gpt-oss: windows in every second layer, attention sinks, biases everywhere, clamped SwiGLU.

A checkpoint has the experts of a layer in one tensor, gate and up interleaved (gate in the even
places), as [E, in, out] of floats or as [E, out, in / 32] blocks of MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...kernels import ClampedSwiglu, MoeWeights
from ..layers import MoeBlock
from ..routing import SoftmaxRouting
from ..shard import Shard
from ..weights import Checkpoint
from .decoder import DecoderLayer
from .loading import Loader
from .mxfp4 import BLOCK, dequantise


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p, shard, config = loader.checkpoint, f"model.layers.{n}.", loader.shard, loader.config
    heads = slice(shard.rank * shard.heads, (shard.rank + 1) * shard.heads)
    sinks = ck.get(p + "self_attn.sinks", rows=heads)
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight"),
        attention=replace(loader.attention(n, norm=None), sinks=sinks),
        post_norm=ck.get(p + "post_attention_layernorm.weight"),
        moe=MoeBlock(
            comm=loader.comm,
            runner=loader.runner,
            router=ck.get(p + "mlp.router.weight"),
            router_bias=ck.get(p + "mlp.router.bias"),
            experts=_experts(loader, p + "mlp.experts."),
            routing=SoftmaxRouting(config.top_k, config.norm_topk_prob),
        ),
    )


def _experts(loader: Loader, prefix: str) -> MoeWeights:
    config, ck, shard = loader.config, loader.checkpoint, loader.shard
    experts, hidden, inter = config.num_experts, config.hidden_size, shard.intermediate
    w13 = torch.empty(experts, 2 * inter, hidden, dtype=ck.dtype, device=ck.device)
    w2 = torch.empty(experts, hidden, inter, dtype=ck.dtype, device=ck.device)
    reader = _ExpertReader(ck, shard, prefix)
    # One at a time: beside the layer itself, memory holds one expert's blocks and values.
    for e in range(experts):
        w13[e] = _gate_then_up(reader.gate_up(e))
        w2[e] = reader.down(e)
    lo, hi = shard.intermediate_rows()
    bias = ck.get(prefix + "gate_up_proj_bias")[:, 2 * lo : 2 * hi]
    return MoeWeights(
        w13=w13,
        w2=w2,
        w13_bias=_gate_then_up(bias.mT).mT.contiguous(),
        # The ranks' outputs are summed.
        w2_bias=ck.get(prefix + "down_proj_bias") if shard.rank == 0 else None,
        clamped=ClampedSwiglu(*config.swiglu_clamp) if config.swiglu_clamp else None,
    )


def _gate_then_up(rows: torch.Tensor) -> torch.Tensor:
    """Interleaved rows [2I, ...] as all of gate and then all of up."""
    return torch.cat([rows[0::2], rows[1::2]])


@dataclass(frozen=True)
class _ExpertReader:
    """This rank's part of one expert's weights, [out, in], in the model's dtype."""

    checkpoint: Checkpoint
    shard: Shard
    prefix: str

    def gate_up(self, e: int) -> torch.Tensor:
        """[2I, H], still interleaved: cut to a range of I, gate and up stay side by side."""
        lo, hi = self.shard.intermediate_rows()
        name, one = self.prefix + "gate_up_proj", slice(e, e + 1)
        if name in self.checkpoint:
            return self.checkpoint.get(name, rows=one)[0, :, 2 * lo : 2 * hi].mT
        return self._dequantised(name, one, slice(2 * lo, 2 * hi))

    def down(self, e: int) -> torch.Tensor:
        """[H, I]"""
        lo, hi = self.shard.intermediate_rows()
        name, one = self.prefix + "down_proj", slice(e, e + 1)
        if name in self.checkpoint:
            return self.checkpoint.get(name, rows=one, cols=slice(lo, hi))[0].mT
        # Ranks may meet inside a block, of which each takes its part.
        return self._dequantised(name, one, slice(None), slice(lo, hi))

    def _dequantised(
        self, name: str, expert: slice, out: slice, in_: slice | None = None
    ) -> torch.Tensor:
        blocks = self.checkpoint.stored(name + "_blocks", expert, out)[0]  # [out, in / 32, 16]
        scales = self.checkpoint.stored(name + "_scales", expert, out)[0]
        if in_ is None:
            return dequantise(blocks, scales, self.checkpoint.dtype)
        first, end = in_.start // BLOCK, -(-in_.stop // BLOCK)
        values = dequantise(blocks[:, first:end], scales[:, first:end], self.checkpoint.dtype)
        return values[:, in_.start - first * BLOCK : in_.stop - first * BLOCK]
