"""gpt-oss: windows in every second layer, attention sinks, biases everywhere, clamped SwiGLU.

A checkpoint has the experts of a layer in one tensor, gate and up interleaved (gate in the even
places), as [E, in, out] of floats or as [E, out, in / 32] blocks of MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...kernels import ClampedSwiglu, MoeWeights
from ..config import ModelConfig
from ..layers import MoeBlock
from ..shard import Shard
from ..weights import TensorSource
from .decoder import DecoderLayer
from .loading import Loader
from .mxfp4 import BLOCK, dequantise


def load_layer(loader: Loader, n: int) -> DecoderLayer:
    ck, p, shard, m = loader.checkpoint, f"model.layers.{n}.", loader.shard, loader.config
    hidden = (m.hidden_size,)
    heads = slice(shard.rank * shard.heads, (shard.rank + 1) * shard.heads)
    sinks = ck.get(p + "self_attn.sinks", (m.num_heads,), heads)
    return DecoderLayer(
        input_norm=ck.get(p + "input_layernorm.weight", hidden),
        attention=replace(loader.attention(n, norm=None), sinks=sinks),
        post_norm=ck.get(p + "post_attention_layernorm.weight", hidden),
        moe=MoeBlock(
            comm=loader.comm,
            runner=loader.runner,
            router=ck.get(p + "mlp.router.weight", (m.num_experts, m.hidden_size)),
            router_bias=ck.get(p + "mlp.router.bias", (m.num_experts,)),
            experts=_experts(loader, p + "mlp.experts."),
            top_k=m.top_k,
            norm_topk_prob=m.norm_topk_prob,
            local_ids=loader.local_ids(),
        ),
    )


def _experts(loader: Loader, prefix: str) -> MoeWeights:
    config, ck, shard = loader.config, loader.checkpoint, loader.shard
    count, hidden, whole = config.num_experts, config.hidden_size, config.moe_intermediate_size
    mine = shard.experts
    w13 = loader.empty(len(mine), 2 * shard.intermediate, hidden)
    w2 = loader.empty(len(mine), hidden, shard.intermediate)
    reader = _ExpertReader(ck, config, shard, prefix)
    # One at a time: beside the layer itself, a loading thread holds one expert's blocks and values.
    for n, e in enumerate(mine):
        w13[n] = _gate_then_up(reader.gate_up(e))
        w2[n] = reader.down(e)
    lo, hi = shard.intermediate_rows()
    rows, columns = slice(mine.start, mine.stop), slice(2 * lo, 2 * hi)
    bias = ck.get(prefix + "gate_up_proj_bias", (count, 2 * whole), rows, columns)
    w2_bias = None
    if shard.expert_tp_rank == 0:  # the outputs of the ranks that share an expert are summed
        w2_bias = ck.get(prefix + "down_proj_bias", (count, hidden), rows)
    return MoeWeights(
        w13=w13,
        w2=w2,
        w13_bias=_gate_then_up(bias.mT).mT.contiguous(),
        w2_bias=w2_bias,
        clamped=ClampedSwiglu(*config.swiglu_clamp) if config.swiglu_clamp else None,
    )


def _gate_then_up(rows: torch.Tensor) -> torch.Tensor:
    """Interleaved rows [2I, ...] as all of gate and then all of up."""
    return torch.cat([rows[0::2], rows[1::2]])


@dataclass(frozen=True)
class _ExpertReader:
    """This rank's part of one expert's weights, [out, in], in the model's dtype."""

    checkpoint: TensorSource
    config: ModelConfig
    shard: Shard
    prefix: str

    def gate_up(self, e: int) -> torch.Tensor:
        """[2I, H], still interleaved: cut to a range of I, gate and up stay side by side."""
        h, i = self.config.hidden_size, 2 * self.config.moe_intermediate_size
        lo, hi = self.shard.intermediate_rows()
        columns = slice(2 * lo, 2 * hi)
        name, one = self.prefix + "gate_up_proj", slice(e, e + 1)
        if name in self.checkpoint:
            return self.checkpoint.get(name, self._shape(h, i), one, depth=columns)[0].mT
        return self._dequantised(name, (i, h), one, columns)

    def down(self, e: int) -> torch.Tensor:
        """[H, I]"""
        h, i = self.config.hidden_size, self.config.moe_intermediate_size
        lo, hi = self.shard.intermediate_rows()
        name, one = self.prefix + "down_proj", slice(e, e + 1)
        if name in self.checkpoint:
            return self.checkpoint.get(name, self._shape(i, h), one, slice(lo, hi))[0].mT
        # Ranks may meet inside a block, of which each takes its part.
        return self._dequantised(name, (h, i), one, slice(0, h), slice(lo, hi))

    def _shape(self, *one: int) -> tuple[int, ...]:
        return self.config.num_experts, *one

    def _dequantised(
        self,
        name: str,
        shape: tuple[int, int],
        expert: slice,
        out: slice,
        in_: slice | None = None,
    ) -> torch.Tensor:
        """Of one expert's tensor of `shape`, [out, in]."""
        ck, whole = self.checkpoint, self._shape(shape[0], shape[1] // BLOCK)
        # [out, in / 32, 16]
        blocks = ck.stored(name + "_blocks", (*whole, BLOCK // 2), expert, out)[0]
        scales = ck.stored(name + "_scales", whole, expert, out)[0]
        if in_ is None:
            return dequantise(blocks, scales, ck.dtype)
        first, end = in_.start // BLOCK, -(-in_.stop // BLOCK)
        values = dequantise(blocks[:, first:end], scales[:, first:end], ck.dtype)
        return values[:, in_.start - first * BLOCK : in_.stop - first * BLOCK]
