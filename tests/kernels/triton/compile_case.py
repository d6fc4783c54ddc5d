"""Compiles every kernel for a Hopper GPU, on a machine without one:

python tests/kernels/triton/compile_case.py

Triton's interpreter takes more than its compiler does. Here layers run as they would on a GPU, but
a launch ends once its kernel is machine code; what the tensors hold doesn't matter.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

# What a Hopper GPU would be asked for when the kernels' modules are imported.
with (
    mock.patch("torch.cuda.is_available", return_value=True),
    mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
):
    from loraplex.kernels import (
        FP8,
        DenseLoraTables,
        ExpertLoraTables,
        LoraBatch,
        MoeRunner,
        MoeWeights,
        fp8_blocks,
        gpu,
    )
    from loraplex.kernels.gpu import (
        FusedBackend,
        GemmTile,
        HookedBackend,
        MoeTiles,
        ShrinkTile,
        least_kept,
    )
    from loraplex.kernels.gpu.lora import lora_linear_
    from loraplex.workers.attention import PagedBatch
    from loraplex.workers.step import SequenceStep

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 232_448  # bytes that a block may use on Hopper
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 512, 256, 8, 2
SLOTS = 4


class Hopper:
    """As much of a driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


run_kernel = JITFunction.run
compiled: dict[str, str] = {}  # names by hash


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run_kernel(self, *args, grid=grid, warmup=True, **kwargs)
    if kernel.hash not in compiled:
        compiled[kernel.hash] = self.__name__
        used = kernel.metadata.shared
        print(f"{self.__name__}: {used} bytes of shared memory", flush=True)
        if used > SHARED_MEMORY:
            raise SystemExit(f"{self.__name__} needs {used} bytes of shared memory")


def tables(dtype: torch.dtype, shared_outer: bool) -> ExpertLoraTables:
    entry = (SLOTS, EXPERTS)
    offsets = [torch.zeros(entry, dtype=torch.int64) for _ in range(4)]
    return ExpertLoraTables(
        torch.zeros(1 << 16, dtype=dtype),
        *offsets,
        rank=torch.full((*entry, 3), 16, dtype=torch.int32),
        scale=torch.ones(*entry, 3),
        layout=torch.zeros(SLOTS, dtype=torch.int32),
        max_rank=64,
        rank_multiple=8,
        shared_outer=shared_outer,
    )


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and a scale for each block."""
    experts, rows, columns = weight.shape
    return weight.to(FP8), torch.ones(experts, fp8_blocks(rows), fp8_blocks(columns))


def layers(
    dtype: torch.dtype,
    tokens: int,
    tiles: MoeTiles | None,
    shared_outer: bool = False,
    quantised: bool = False,
) -> None:
    """`tiles`: None = those that the layer gets."""
    w13 = torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype)
    w2 = torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype)
    weights = MoeWeights(w13, w2)
    if quantised:
        (w13, w13_scale), (w2, w2_scale) = fp8(w13), fp8(w2)
        weights = MoeWeights(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale)
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    ids = torch.zeros(tokens, TOP_K, dtype=torch.int32)
    args = (x, weights, torch.ones(tokens, TOP_K), ids)
    batch = LoraBatch(torch.zeros(tokens, dtype=torch.int32), None)
    for backend in (FusedBackend(tiles), HookedBackend(tiles)):
        MoeRunner(backend)(*args)
        MoeRunner(backend)(*args, tables(dtype, shared_outer), batch)


def dense(dtype: torch.dtype, tokens: int) -> None:
    entry = (SLOTS, 3)
    lora = DenseLoraTables(
        torch.zeros(1 << 16, dtype=dtype),
        torch.zeros(entry, dtype=torch.int64),
        torch.zeros(entry, dtype=torch.int64),
        rank=torch.full(entry, 16, dtype=torch.int32),
        scale=torch.ones(entry),
        out_sizes=(256, 64, 64),
        max_rank=64,
        rank_multiple=8,
    )
    batch = LoraBatch(torch.zeros(tokens, dtype=torch.int32), None)
    lora_linear_(torch.zeros(tokens, 384, dtype=dtype), torch.zeros(tokens, HIDDEN, dtype=dtype),
                 lora, batch)  # fmt: skip


def attention(dtype: torch.dtype, heads: int, kv_heads: int, d: int, latent: int = 0) -> None:
    """A mixed step, its keys shared out and not; `latent`: columns of the values in the keys."""
    blocks = 1024
    k_cache = torch.zeros(blocks, 16, kv_heads, d, dtype=dtype)
    v_cache = k_cache[..., :latent] if latent else torch.zeros_like(k_cache)
    decoding = SequenceStep([0], 199, list(range(13)), -1)
    mixed = [decoding, SequenceStep([0] * 40, 0, [20, 21, 22], -1)]
    long = [SequenceStep([0], 16 * blocks - 1, list(range(blocks)), -1)]
    for sequences in (mixed, long):
        batch = PagedBatch.plan(sequences, 16, torch.device("cpu"))
        tokens = sum(len(s.token_ids) for s in sequences)
        q = torch.zeros(tokens, heads, d, dtype=dtype)
        k = torch.zeros(tokens, kv_heads, d, dtype=dtype)
        slots = batch.sequences.write_slots
        gpu.write_kv(k, None if latent else k, k_cache, v_cache, slots)
        for window, sinks in ((None, None), (128, torch.zeros(heads, dtype=dtype))):
            gpu.paged_attention(
                q, k_cache, v_cache, batch.sequences,
                scale=0.1, window=window, sinks=sinks, latent=latent > 0,
            )  # fmt: skip


def between_projections(dtype: torch.dtype) -> None:
    heads, kv_heads, d, tokens = 32, 4, 128, 3
    qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * d, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 4, 16, kv_heads, d, dtype=dtype)
    slots, angles = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, d)
    for norm in (None, torch.ones(d, dtype=dtype)):
        gpu.qkv_prepare(qkv, k_cache, v_cache, slots, angles, angles, norm, norm, 1e-6)
    x = torch.zeros(tokens, 2048, dtype=dtype)
    for y in (None, x):
        gpu.add_rms_norm_(x, y, torch.ones(2048, dtype=dtype), 1e-6)


def main() -> None:
    decode = MoeTiles(
        16, GemmTile(64, 128, 4, 3), GemmTile(64, 128, 4, 3),
        ShrinkTile(4, 16, 128, 4), ShrinkTile(4, 16, 128, 2),
    )  # fmt: skip
    wide, tall = GemmTile(128, 64, 8, 4, tma=True), ShrinkTile(2, 64, 64, 1)
    prefill = MoeTiles(128, wide, replace(wide, block_n=256, expand_k=64, short=True), tall, tall)
    ahead = {"expand_ahead": True, "expand_k": 16}
    persistent = MoeTiles(
        128,
        replace(wide, stages=3, persistent=1, **ahead),
        replace(wide, block_n=256, stages=3, persistent=1, **ahead),
        tall,
        tall,
    )
    bf16 = torch.bfloat16
    layers(bf16, 8, decode, shared_outer=True)
    layers(torch.float16, 8, decode)
    layers(bf16, 4096, prefill)
    layers(bf16, 4096, persistent)
    # The heuristic's FP8 tiles, of every height; and those that reach over several blocks.
    for tokens in (8, 64, 150, 512, 4096):
        layers(bf16, tokens, None, quantised=True)
    layers(torch.float16, 8, None, quantised=True)
    layers(torch.float32, 8, None, quantised=True)
    layers(bf16, 4096, prefill, quantised=True)
    for tokens in (8, 512, 4096):
        dense(bf16, tokens)
    attention(bf16, 32, 4, 128)
    attention(bf16, 64, 8, 64)
    attention(bf16, 16, 1, 576, latent=512)
    between_projections(bf16)
    for padding in (None, torch.zeros(4, 1, dtype=torch.bool)):
        gpu.softmax_topk(torch.zeros(4, 128, dtype=bf16), 8, True, padding)
    pieces = torch.zeros(2, 5, dtype=torch.int64)
    for packed, pool in ((bf16, bf16), (torch.float32, torch.float16), (torch.float16, bf16)):
        for flat in (True, False):
            staged, held = torch.zeros(64, dtype=packed), torch.zeros(64, dtype=pool)
            gpu.scatter_pieces_(held, staged, pieces, flat)
    least_kept(
        torch.zeros(2, 151936),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.float64),
    )
    uniform, rows = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    gpu.draw(torch.zeros(4, 151936), uniform, rows, torch.ones(2))
    gpu.draw(torch.zeros(2, 151936), uniform, None, None)
    print(f"{len(compiled)} kernels compiled")


if __name__ == "__main__":
    driver.set_active(Hopper())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    main()
