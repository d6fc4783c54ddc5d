"""gpt-oss: windows in every second layer, attention sinks, biases everywhere, clamped SwiGLU.

A checkpoint has the experts of a layer in one tensor, gate and up interleaved (gate in the even
places), as [E, in, out] of floats or as [E, out, in / 32] blocks of MXFP4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...kernels import ClampedSwiglu, MoeWeights
from ..layers.blocks import MoeBlock
from ..layers.routing import SoftmaxRouting
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
            routing=SoftmaxRouting(m.top_k, m.norm_topk_prob),
            local_ids=loader.local_ids(),
        ),
    )


def quantised(checkpoint: TensorSource) -> bool:
    """Whether the experts are blocks of MXFP4."""
    return "model.layers.0.mlp.experts.gate_up_proj" not in checkpoint


def _experts(loader: Loader, prefix: str) -> MoeWeights:
    ck, m, shard = loader.checkpoint, loader.config, loader.shard
    mine = shard.experts
    w13 = loader.empty(len(mine), 2 * shard.intermediate, m.hidden_size)
    w2 = loader.empty(len(mine), m.hidden_size, shard.intermediate)
    reader = _ExpertReader(loader, prefix)
    # One at a time: beside the layer itself, a loading thread holds one expert's blocks and values.
    for n, e in enumerate(mine):
        w13[n] = _gate_then_up(reader.gate_up(e))
        w2[n] = reader.down(e)
    lo, hi = shard.intermediate_rows()
    experts, wide = slice(mine.start, mine.stop), (m.num_experts, 2 * m.moe_intermediate_size)
    w13_bias = ck.get(prefix + "gate_up_proj_bias", wide, experts, slice(2 * lo, 2 * hi))
    w2_bias = None
    if shard.expert_tp_rank == 0:  # the outputs of an expert's parts are summed
        w2_bias = ck.get(prefix + "down_proj_bias", (m.num_experts, m.hidden_size), experts)
    return MoeWeights(
        w13=w13,
        w2=w2,
        w13_bias=_gate_then_up(w13_bias.mT).mT.contiguous(),
        w2_bias=w2_bias,
        clamped=ClampedSwiglu(*m.swiglu_clamp) if m.swiglu_clamp else None,
    )


def _gate_then_up(rows: torch.Tensor) -> torch.Tensor:
    """Interleaved rows [2I, ...] as all of gate and then all of up."""
    return torch.cat([rows[0::2], rows[1::2]])


@dataclass(frozen=True)
class _ExpertReader:
    """This rank's part of one expert's weights, [out, in], in the model's dtype."""

    loader: Loader
    prefix: str

    def gate_up(self, e: int) -> torch.Tensor:
        """[2I, H], still interleaved: cut to a range of I, gate and up stay side by side."""
        m = self.loader.config
        lo, hi = self.loader.shard.intermediate_rows()
        name, both = self.prefix + "gate_up_proj", slice(2 * lo, 2 * hi)
        if name in self.loader.checkpoint:
            shape = (m.num_experts, m.hidden_size, 2 * m.moe_intermediate_size)
            return self.loader.checkpoint.get(name, shape, slice(e, e + 1), depth=both)[0].mT
        whole = slice(0, m.hidden_size)
        return self._dequantised(name, (2 * m.moe_intermediate_size, m.hidden_size), e, both, whole)

    def down(self, e: int) -> torch.Tensor:
        """[H, I]"""
        m = self.loader.config
        name, part = self.prefix + "down_proj", slice(*self.loader.shard.intermediate_rows())
        if name in self.loader.checkpoint:
            shape = (m.num_experts, m.moe_intermediate_size, m.hidden_size)
            return self.loader.checkpoint.get(name, shape, slice(e, e + 1), part)[0].mT
        whole = slice(0, m.hidden_size)
        return self._dequantised(name, (m.hidden_size, m.moe_intermediate_size), e, whole, part)

    def _dequantised(
        self, name: str, shape: tuple[int, int], e: int, out: slice, in_: slice
    ) -> torch.Tensor:
        """Rows `out` and columns `in_` of expert e's matrix, whose `shape` is that of the whole.
        Ranks may meet inside a block, of which each takes its part."""
        get, one = self.loader.checkpoint.get, slice(e, e + 1)
        first, end = in_.start // BLOCK, -(-in_.stop // BLOCK)
        whole = (self.loader.config.num_experts, shape[0], shape[1] // BLOCK)
        cut = slice(first, end)
        blocks = get(name + "_blocks", (*whole, BLOCK // 2), one, out, cut, dtype=torch.uint8)
        scales = get(name + "_scales", whole, one, out, cut, dtype=torch.uint8)
        values = dequantise(blocks[0], scales[0], self.loader.checkpoint.dtype)
        return values[:, in_.start - first * BLOCK : in_.stop - first * BLOCK]
