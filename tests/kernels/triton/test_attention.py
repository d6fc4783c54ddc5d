"""The paged attention kernels in the interpreter against slow, plainly right attention.

Memory that no token was written to holds NaN throughout.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loraplex.workers.attention import DecodeBuffers, PagedBatch
from loraplex.workers.errors import WorkerError
from loraplex.workers.step import SequenceStep

from ...attention_cases import LENGTHS, random_case
from ..poison import poisoned_memory
from .layers import examples, interpreted

pytestmark = interpreted

module = importlib.import_module("loraplex.kernels.gpu.paged_attention")
CPU = torch.device("cpu")
ERROR = {torch.float32: 1e-5, torch.float16: 4e-3}
# query heads, KV heads, D, DV, latent
SHAPES = [
    (4, 4, 16, 16, False),
    (8, 2, 16, 16, False),
    (6, 2, 24, 24, False),
    (7, 1, 40, 8, False),
    (6, 1, 24, 16, True),
    (20, 1, 20, 12, True),
    (3, 3, 8, 8, False),
]


def check(case, batch, rows=slice(None)):
    with poisoned_memory():
        got = case.run(batch)
    wanted = case.expected
    torch.testing.assert_close(
        got[rows].double(), wanted, atol=ERROR[got.dtype], rtol=ERROR[got.dtype]
    )
    return got


def planned(case):
    return PagedBatch.plan(case.steps, case.cache.k.shape[2], CPU)


@pytest.fixture
def split(monkeypatch):
    """Keys of decode sequences are shared among `n` programs, if there are 32 for each."""

    def into(n):
        monkeypatch.setattr(module, "MIN_SHARE", 32)
        monkeypatch.setattr(module, "decode_splits", lambda *_: n)

    return into


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixed_batch(shape, window, sinks):
    *sizes, latent = shape
    case = random_case(LENGTHS, *sizes, latent=latent, window=window, sinks=sinks, unused=torch.nan)
    check(case, planned(case))
    assert case.cache.k[0].isnan().all()


@examples(30)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(
        st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 40))),
        min_size=1, max_size=5,
    ),
    shape=st.sampled_from(SHAPES),
    window=st.sampled_from([None, None, 1, 5, 33, 1000]),
    sinks=st.booleans(),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(list(ERROR)),
)  # fmt: skip
def test_any_step(seed, lengths, shape, window, sinks, block_size, dtype):
    torch.manual_seed(seed)
    *sizes, latent = shape
    case = random_case(
        lengths, *sizes, latent=latent, window=window, sinks=sinks, block_size=block_size,
        blocks=700 // block_size, unused=torch.nan, dtype=dtype,
    )  # fmt: skip
    check(case, planned(case))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("splits", [2, 3, 25])
def test_shared_keys(split, splits, window, sinks):
    """More programs than a reduction takes at once, and more than there are keys for."""
    split(splits)
    case = random_case(
        [(0, 1), (600, 1), (95, 1), (31, 1), (32, 1), (3, 5)], 6, 2, 24, 16, window=window,
        sinks=sinks, blocks=200, unused=torch.nan,
    )  # fmt: skip
    check(case, planned(case))


@pytest.mark.parametrize("short", [1, 2])
@pytest.mark.parametrize("window", [None, 50])
def test_a_short_sequence_is_shared_out_as_if_none_were_long(short, window, monkeypatch):
    """To the last bit: what its neighbours or a graph's longest context ask for isn't for it."""
    monkeypatch.setattr(module, "MIN_SHARE", 32)
    monkeypatch.setattr(module, "LONG_CONTEXT", 100)
    case = random_case(
        [(99, 1), (0, 1), (333, 1), (40, 1), (100, 1)], 6, 2, 24, 16, window=window,
        sinks=True, blocks=200, unused=torch.nan,
    )  # fmt: skip
    batch = planned(case)
    monkeypatch.setattr(module, "decode_splits", lambda *_: short)
    alone = case.run(batch)
    monkeypatch.setattr(module, "decode_splits", lambda _, most, __: 5 if most > 100 else short)
    got = check(case, batch)
    assert torch.equal(got[[0, 1, 3]], alone[[0, 1, 3]])
    if window is None:
        assert not torch.equal(got[[2, 4]], alone[[2, 4]])


def test_shared_keys_of_a_latent_cache(split):
    split(3)
    case = random_case([(200, 1), (7, 1)], 20, 1, 24, 16, latent=True, unused=torch.nan)
    check(case, planned(case))


def test_chunks_of_several_tiles():
    lengths = [(0, 300), (45, 129), (200, 1), (3, 128)]
    case = random_case(lengths, 3, 1, 16, 16, blocks=200, unused=torch.nan)
    check(case, planned(case))


def test_decode_buffers_serve_one_step_after_another(split):
    buffers = DecodeBuffers(9, 40, 8, CPU)
    batch = buffers.batch(8, 512)
    for splits, sinks, lengths in (
        (1, False, [50, 3, 0, 120, 7]),
        (2, True, [99, 10]),
        (1, True, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, False, [0]),
    ):
        split(splits)
        case = random_case([(n, 1) for n in lengths], 8, 2, 16, 16, sinks=sinks, unused=torch.nan)
        padding = 8 - len(lengths)
        case.q, case.k, case.v = (
            torch.cat([x, torch.full((padding, *x.shape[1:]), value)])
            for x, value in ((case.q, torch.nan), (case.k, 7.0), (case.v, 7.0))
        )
        written = written_tokens(case.cache) + len(lengths)
        buffers.fill(case.steps)
        got = check(case, batch, slice(len(lengths)))
        assert not got[len(lengths) :].any()
        assert written_tokens(case.cache) == written


def written_tokens(cache) -> int:
    """Of all layers."""
    return int((~cache.k.isnan() & ~cache.v.isnan()).any(-1).any(-1).sum())


def test_decode_buffers_refuse_what_has_no_room():
    buffers = DecodeBuffers(2, 3, 8, CPU)
    with pytest.raises(WorkerError, match="3 sequences; there is room for 2"):
        buffers.fill([SequenceStep([0], 0, [0], -1)] * 3)
    with pytest.raises(WorkerError, match="4 blocks; there is room for 3"):
        buffers.fill([SequenceStep([0], 8, [0, 1], -1)] * 2)
    with pytest.raises(WorkerError, match="one new token each"):
        buffers.fill([SequenceStep([0, 1], 0, [0], -1)])
    with pytest.raises(WorkerError, match="1 to 2 sequences, not 3"):
        buffers.batch(3, 8)


def test_inputs_may_be_parts_of_wider_rows():
    case = random_case(LENGTHS, 8, 2, 16, 16, unused=torch.nan)
    rows = torch.cat([x.flatten(1) for x in (case.q, case.k, case.v)], 1)
    q, k, v = rows.split((128, 32, 32), 1)
    case.q, case.k, case.v = (x.view(len(rows), -1, 16) for x in (q, k, v))
    check(case, planned(case))


def test_a_launch_is_shared_out_by_its_shape():
    splits = module.decode_splits
    assert splits(32 * 4, 256, 132) == splits(32 * 4, 4096, 132) == splits(1000, 8192, 132) == 1
    assert splits(4, 256, 132) == 1
    assert splits(4, 4096, 132) == 16
    assert splits(1, 1 << 20, 132) == 64
    assert splits(32 * 4, 8192, 132) == 4
