"""What weights and activations leave of a GPU is shared out between KV cache and adapter pool."""

from __future__ import annotations

import pytest
from loraplex.workers import WorkerError
from loraplex.workers.comm import Comm
from loraplex.workers.memory import Sizes, Usage, share_out
from loraplex.workers.model_runner import ModelRunner

GIB = 2**30


def test_what_is_left_is_a_fraction_less_what_is_needed_anyway():
    assert Usage(80 * GIB, 30 * GIB, 2 * GIB).left(0.5) == 8 * GIB


@pytest.mark.parametrize(
    ("kv_tokens", "pool_bytes", "expected"),
    [
        (None, None, Sizes(7 * GIB // 1000 // 16 * 16, 3 * GIB)),
        (None, 4 * GIB, Sizes(6 * GIB // 1000 // 16 * 16, 4 * GIB)),
        (32_000, None, Sizes(32_000, 10 * GIB - 32_000_000)),
    ],
)
def test_sizes_that_are_given_stay_and_the_rest_is_used_up(kv_tokens, pool_bytes, expected):
    sizes = share_out(10 * GIB, 1000, 16, kv_tokens, pool_bytes, adapter_fraction=0.3)
    assert sizes.pool_bytes == pytest.approx(expected.pool_bytes, abs=1)
    assert sizes.kv_tokens == pytest.approx(expected.kv_tokens, abs=16)
    assert sizes.kv_tokens % 16 == 0
    assert sizes.kv_tokens * 1000 + sizes.pool_bytes <= 10 * GIB


@pytest.mark.parametrize(
    ("left", "kv_tokens", "pool_bytes", "name"),
    [
        (-GIB, None, None, "pool_bytes"),
        (GIB, 2_000_000, None, "pool_bytes"),
        (GIB, None, 2 * GIB, "kv_tokens"),
    ],
)
def test_no_room_is_said_with_the_setting_to_change(left, kv_tokens, pool_bytes, name):
    with pytest.raises(WorkerError, match=rf"{name} can't be derived.*raise memory_fraction"):
        share_out(left, 1000, 16, kv_tokens, pool_bytes, adapter_fraction=0.3)


def test_sizes_that_are_both_given_are_kept_where_they_fit_and_else_refused_with_all_of_them():
    given = {"kv_tokens": 4 * GIB // 1000, "pool_bytes": 6 * GIB}
    assert share_out(10 * GIB, 1000, 16, **given, adapter_fraction=0.3) == Sizes(**given)
    says = (
        r"kv_tokens = 4294967 take 4.00 GiB and the adapter pool 6.00 GiB, but weights and "
        r"activations leave 9.00 GiB; lower kv_tokens, pool_bytes"
    )
    with pytest.raises(WorkerError, match=says):
        share_out(9 * GIB, 1000, 16, **given, adapter_fraction=0.3)


def test_an_engine_works_in_the_sizes_that_were_derived(
    demo, make_engine, run, greedy, monkeypatch
):
    monkeypatch.setattr(ModelRunner, "_sizes", lambda self: Sizes(160, 3 << 20))
    engine = make_engine(kv_tokens=None, pool_bytes=None)
    assert engine.report().kv_blocks_total == 10
    assert engine.report().pool_bytes_total <= 3 << 20
    out = run(engine, [greedy("long", range(10, 180)), greedy("fits", [10, 11])])
    assert out["long"].last.error_code == "context_length_exceeded"
    assert out["fits"].last.finish_reason == "length"


def test_a_cpu_has_no_sizes_to_derive(demo):
    with pytest.raises(WorkerError, match="give both for a CPU"):
        ModelRunner(demo.config(kv_tokens=None), Comm())
