"""The served model families by `model_type`, and how one is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from ...kernels import MoeRunner
from ..comm import Comm
from ..config import ModelConfig
from ..layers.rope import RotaryEmbedding, inverse_frequencies
from ..shard import Shard
from ..weights import TensorSource
from . import deepseek, fp8, gpt_oss, mixtral, mxfp4, olmoe, qwen2_moe, qwen3_moe
from .decoder import Decoder, DecoderLayer
from .loading import Loader

# Layers read at a time: one alone would wait for the disk between its reads; more than there are
# cores would wait for each other.
LOAD_THREADS = min(8, len(os.sched_getaffinity(0)))

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
    checkpoint: TensorSource,
    comm: Comm,
    runner: MoeRunner,
    max_positions: int,
    device: torch.device,
) -> Decoder:
    """This rank's part of the model that `config` describes.

    Raises:
        ModelFilesInvalid: the checkpoint lacks a tensor, or one doesn't fit config.json.
        ModelUnsupported: the device can't run the checkpoint's quantisation.
    """
    table = (config.vocab_size, config.hidden_size)
    embed = checkpoint.get("model.embed_tokens.weight", table)
    # Only rank 0 samples, so only it needs the head.
    head = embed
    if not config.tie_word_embeddings and shard.rank == 0:
        head = checkpoint.get("lm_head.weight", table)
    if config.quantisation == "mxfp4" and gpt_oss.quantised(checkpoint):
        mxfp4.say_what_it_takes(config, shard, checkpoint.dtype)
    source, quantised = checkpoint, None
    if config.quantisation == "fp8":
        fp8.check_device(device)
        source = quantised = fp8.Fp8Source(checkpoint)
    loader = Loader(config, shard, source, comm, runner)
    frequencies, scaling = inverse_frequencies(config.rope_dim, config.rope_theta, config.yarn)
    load_layer = LAYERS[config.model_type]
    with ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="weights") as threads:
        layers = list(threads.map(lambda n: load_layer(loader, n), range(config.num_layers)))
    if quantised is not None:
        quantised.say_what_it_takes(shard)
    return Decoder(
        embed=embed,
        layers=layers,
        norm=checkpoint.get("model.norm.weight", (config.hidden_size,)),
        head=head,
        rope=RotaryEmbedding(frequencies, scaling, max_positions, device),
        eps=config.rms_norm_eps,
    )
