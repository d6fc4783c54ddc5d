"""Tables of measured tiles: read, chosen from, and fit for the kernels."""

import importlib
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex.kernels import FP8_BLOCK
from loraplex.kernels.gpu import GemmTile, MoeShape, MoeTiles, ShrinkTile

module = importlib.import_module("loraplex.kernels.gpu.tiles")

SHAPE = MoeShape(64, 32, 8, 2, torch.bfloat16)
TABLES = sorted(module.FOLDER.glob("*/*.json"))


def numbered(n: int) -> MoeTiles:
    """Tiles that can be told from others by their number."""
    gemm, shrink = GemmTile(32, 32, 4, 2 + n), ShrinkTile(2, 16, 32, 1)
    return MoeTiles(16, gemm, gemm, shrink, shrink)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables; what was read before is forgotten."""

    def forget():
        module.choose.cache_clear()
        module._table.cache_clear()

    monkeypatch.setattr(module, "FOLDER", tmp_path)
    forget()
    yield tmp_path
    forget()


def write(folder, entries: dict[tuple[int, int], MoeTiles]) -> None:
    """Entries by adapters and tokens."""
    path = folder / "Some_GPU" / f"{SHAPE.name}.json"
    path.parent.mkdir()
    by_adapters = {
        adapters: {t: module.to_json(e) for (a, t), e in entries.items() if a == adapters}
        for adapters, _ in entries
    }
    path.write_text(json.dumps(by_adapters))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def assert_fit(tiles: MoeTiles) -> None:
    """What the kernels ask of tiles: dots of at least 16, ranges of powers of two."""
    sizes = [tiles.block_m]
    for gemm in (tiles.gate_up, tiles.down):
        sizes += [gemm.block_n, gemm.block_k, gemm.expand_k]
        assert gemm.persistent >= 0
        assert gemm.stages >= 1
        assert is_power_of_two(gemm.warps)
    for shrink in (tiles.shrink_gate_up, tiles.shrink_down):
        sizes += [shrink.rows, shrink.block_k]
        assert shrink.groups >= 1
        assert shrink.splits >= 1
        assert is_power_of_two(shrink.warps)
    assert all(size >= 16 and is_power_of_two(size) for size in sizes), sizes


def test_the_nearest_measured_entry_is_chosen(folder):
    write(folder, {
        (0, 1): numbered(1),
        (0, 64): numbered(2),
        (1, 8): numbered(3),
        (32, 8): numbered(4),
        (32, 512): numbered(5),
    })  # fmt: skip
    for adapters, tokens, wanted in (
        (0, 1, 1),
        (0, 7, 1),  # by ratio
        (0, 9, 2),
        (0, 10_000, 2),
        (1, 8, 3),
        (1, 0, 3),
        (5, 8, 3),
        (6, 8, 4),
        (256, 8, 4),
        (256, 300, 5),
        (1, 10_000, 5),  # tokens matter more
    ):
        assert module.choose(SHAPE, tokens, "Some GPU", adapters) == numbered(wanted)


def test_elsewhere_a_heuristic_answers(folder):
    expected = module.heuristic(SHAPE, 20)
    assert module.choose(SHAPE, 20, "Some GPU", 0) == expected
    module.choose.cache_clear()
    module._table.cache_clear()
    write(folder, {(0, 20): numbered(1)})
    assert module.choose(SHAPE, 20, "Some GPU", 0) == numbered(1)
    assert module.choose(SHAPE, 20, "Some GPU", 3) == expected, "measured without LoRA only"
    assert module.choose(SHAPE, 20, "Other GPU", 0) == expected
    other = replace(SHAPE, top_k=3)
    assert module.choose(other, 20, "Some GPU", 0) == module.heuristic(other, 20)


@given(
    hidden=st.integers(1, 8192),
    intermediate=st.integers(1, 16384),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 16),
    tokens=st.integers(0, 65536),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    fp8=st.booleans(),
)
def test_the_heuristic_gives_tiles_that_the_kernels_take(tokens, **shape):
    tiles = module.heuristic(MoeShape(**shape), tokens)
    assert_fit(tiles)
    if shape["fp8"]:  # steps within a block
        assert FP8_BLOCK % tiles.gate_up.block_k == FP8_BLOCK % tiles.down.block_k == 0


def test_fp8_weights_have_tables_of_their_own():
    assert replace(SHAPE, fp8=True).name == f"{SHAPE.name}_fp8"


def test_every_shipped_table_is_found_and_fit():
    assert TABLES, f"no tables in {module.FOLDER}"
    for path in TABLES:
        match = re.fullmatch(r"H(\d+)_I(\d+)_E(\d+)_K(\d+)_(\w+?)(_fp8)?", path.stem)
        assert match, path.name
        hidden, intermediate, experts, top_k = map(int, match.groups()[:4])
        shape = MoeShape(
            hidden, intermediate, experts, top_k, getattr(torch, match[5]), bool(match[6])
        )
        table = module._table(path.parent.name.replace("_", " "), shape)
        assert any(adapters == 0 for adapters, _ in table), f"{path.name}: none without adapters"
        assert any(adapters > 0 for adapters, _ in table), f"{path.name}: none with adapters"
        for tiles in table.values():
            assert_fit(tiles)
            assert module.from_json(json.loads(json.dumps(module.to_json(tiles)))) == tiles
