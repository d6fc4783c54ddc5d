"""The served model families by `model_type`, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...kernels import MoeRunner
from ..comm import Comm
from ..config import ModelConfig
from ..rope import RotaryEmbedding, inverse_frequencies
from ..shard import Shard
from ..weights import Checkpoint
from . import deepseek, gpt_oss, mixtral, mxfp4, olmoe, qwen2_moe, qwen3_moe
from .decoder import Decoder, DecoderLayer
from .loading import Loader

# `ModelConfig` refuses every other type, before a weight is read.
LAYERS: Mapping[str, Callable[[Loader, int], DecoderLayer]] = {
    "qwen3_moe": qwen3_moe.load_layer,
    "olmoe": olmoe.load_layer,
    "mixtral": mixtral.load_layer,
    "qwen2_moe": qwen2_moe.load_layer,
    "gpt_oss": gpt_oss.load_layer,
    "deepseek_v2": deepseek.load_layer,
    "deepseek_v3": deepseek.load_layer,
}


def load_model(
    config: ModelConfig,
    shard: Shard,
    checkpoint: Checkpoint,
    comm: Comm,
    runner: MoeRunner,
    max_positions: int,
    device: torch.device,
) -> Decoder:
    """This rank's part of the model that `config` describes.

    Raises:
        ModelFilesInvalid: the checkpoint lacks a tensor.
    """
    embed = checkpoint.get("model.embed_tokens.weight")
    # Only rank 0 samples, so only it needs the head.
    head = embed
    if not config.tie_word_embeddings and shard.rank == 0:
        head = checkpoint.get("lm_head.weight")
    if config.quantisation == "mxfp4":
        mxfp4.say_what_it_takes(config, shard, checkpoint.dtype)
    loader = Loader(config, shard, checkpoint, comm, runner)
    load_layer = LAYERS[config.model_type]
    frequencies, scaling = inverse_frequencies(config.rope_dim, config.rope_theta, config.yarn)
    return Decoder(
        embed=embed,
        layers=[load_layer(loader, n) for n in range(config.num_layers)],
        norm=checkpoint.get("model.norm.weight"),
        head=head,
        rope=RotaryEmbedding(frequencies, scaling, max_positions, device),
        eps=config.rms_norm_eps,
    )
