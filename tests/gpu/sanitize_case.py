"""Every kernel once on a small case, for a sanitizer to watch:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize_case.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_case.py

Results are compared with the definitions as well: a kernel that did nothing would be clean.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

# Every tensor is then an allocation of its own, whose ends the sanitizer knows.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
if __name__ == "__main__":  # our folder, whatever else of that name is installed
    sys.modules["tests"] = tests = ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

import torch
from loraplex.kernels import (
    LoraBatch,
    MoeRunner,
    lora_linear_,
    lora_linear_reference,
    moe_lora_align_block_size,
)
from loraplex.kernels.gpu import FusedBackend, GemmTile, HookedBackend, MoeTiles, ShrinkTile

from tests.gpu.layers import DEVICE, on_gpu
from tests.kernels.cases import assert_aligned, assert_close, random_layer
from tests.kernels.factors import random_dense_tables, random_routing


def moe_layers() -> None:
    gemm = GemmTile(32, 32, 4, 3)
    split = ShrinkTile(2, 16, 32, 2)
    whole = ShrinkTile(2, 32, 32, 1)
    for seed, tiles in enumerate((
        MoeTiles(16, gemm, gemm, split, split),
        MoeTiles(64, GemmTile(32, 32, 4, 3, persistent=1, short=True), gemm, whole, whole),
    )):  # fmt: skip
        layer = random_layer(seed, 40, skipped=0.2, dtype=torch.bfloat16).in_dtype(torch.bfloat16)
        expected, base = layer.expected(), layer.expected_base()
        layer = on_gpu(layer)
        args = (layer.x, layer.weights, layer.topk_weights, layer.topk_ids)
        batch = LoraBatch.from_token_slot(layer.token_slot)
        for backend in (FusedBackend(tiles), HookedBackend(tiles)):
            runner = MoeRunner(backend)
            for layer.tables.shared_outer in (False, True):
                assert_close(runner(*args, layer.tables, batch).cpu(), expected, 3e-2)
            assert_close(runner(*args).cpu(), base, 3e-2)


def weights_by_the_copy_engine() -> None:
    gemm, shrink = GemmTile(32, 32, 4, 3, tma=True), ShrinkTile(2, 16, 32, 1)
    layer = random_layer(3, 40, hidden=64, intermediate=32, dtype=torch.bfloat16)
    layer = layer.in_dtype(torch.bfloat16)
    expected = layer.expected()
    layer = on_gpu(layer)
    out = MoeRunner(FusedBackend(MoeTiles(16, gemm, gemm, shrink, shrink)))(
        layer.x, layer.weights, layer.topk_weights, layer.topk_ids, layer.tables,
        LoraBatch.from_token_slot(layer.token_slot),
    )  # fmt: skip
    assert_close(out.cpu(), expected, 3e-2)


def dense_projections() -> None:
    for tokens in (40, 300):
        tables = random_dense_tables(1, 4, 40, (24, 8), dtype=torch.bfloat16)
        x = torch.randn(tokens, 40).bfloat16()
        token_slot = torch.arange(tokens).int() % 5 - 1
        out = torch.zeros(tokens, 32, dtype=torch.bfloat16, device=DEVICE)
        batch = LoraBatch.from_token_slot(token_slot.to(DEVICE))
        assert batch is not None
        lora_linear_(out, x.to(DEVICE), on_gpu(tables), batch)
        assert_close(out.cpu(), lora_linear_reference(x, tables, token_slot), 3e-2)


def aligns() -> None:
    for tokens in (40, 1100):  # in one launch, and in chunks
        _, ids = random_routing(1, tokens, 12, 4, skipped=0.2)
        token_slot = torch.arange(tokens).int() % 7 - 1
        aligned = moe_lora_align_block_size(ids.to(DEVICE), token_slot.to(DEVICE), 16, 12)
        assert_aligned(aligned, ids, token_slot, 16, 12)


def main() -> None:
    for part in (aligns, moe_layers, weights_by_the_copy_engine, dense_projections):
        part()
        print(f"{part.__name__.replace('_', ' ')}: as defined")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    main()
