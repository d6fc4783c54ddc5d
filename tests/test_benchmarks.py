"""Benchmarks for a GPU still run on the engine as it is: their smallest sizes, on the CPU. Of the
one that starts a service, the parts that need none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraplex.adapter_store import BaseModel, make_pack
from loraplex.cluster.gateway.tokenizer import TextTokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def figures(found: Any) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from figures(part)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield found


@pytest.mark.parametrize("script", ["engine.py", "loading.py"])
def test_it_runs_at_its_smallest_and_writes_its_figures(script: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--tiny", "--device", "cpu", "--out", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # they import each other
    command = [sys.executable, str(BENCHMARKS / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    shown = list(figures(json.loads(out.read_text())))
    assert len(shown) > 10
    assert all(map(math.isfinite, shown))


@pytest.fixture
def beside_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_what_the_serving_benchmark_uploads_is_taken(
    beside_benchmarks: None, tmp_path: Path
) -> None:
    from _serving_gpu_plan import CONFIG, WEIGHTS, Plan

    plan = Plan.tiny(tmp_path, "cpu")
    plan.write_model()
    plan.write_adapter()
    base = BaseModel.from_folder(plan.model, dummy_weights=True)
    config = (plan.adapter / CONFIG).read_bytes()
    info = make_pack(config, plan.adapter / WEIGHTS, base, plan.pack)
    assert (info.format, info.rank_max, len(info.targets)) == ("per_expert", plan.shape.rank, 7)
    # Every token has text: its event isn't left out of a stream.
    tokenizer = TextTokenizer.from_folder(plan.model)
    assert tokenizer.vocab_size == plan.shape.config["vocab_size"]
    assert all(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))


def stream(events: list[Any], cut: int) -> list[tuple[float, bytes]]:
    """An answer's chunks, one per event, as they come in pieces of `cut` bytes at 0, 1, 2, ..."""
    texts = [f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events]
    chunks = "".join(f"{len(text):x}\r\n{text}\r\n" for text in texts)
    raw = f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n".encode()
    return [(float(n), raw[i : i + cut]) for n, i in enumerate(range(0, len(raw), cut))]


def answer(tokens: int) -> list[Any]:
    def event(i: int) -> dict[str, Any]:
        reason = "length" if i + 1 == tokens else None
        return {"choices": [{"text": "a", "finish_reason": reason}], "loraplex": {"tier": "gpu"}}

    usage = {"choices": [], "usage": {"completion_tokens": tokens}}
    return [*map(event, range(tokens)), usage, "[DONE]"]


def test_the_serving_benchmark_reads_a_stream_however_it_is_cut(beside_benchmarks: None) -> None:
    from _serving_gpu_client import _take_apart

    for cut in (1, 7, 50, 1 << 20):
        pieces = stream(answer(5), cut)
        read = _take_apart(-1.0, pieces, 5)
        raw = b"".join(data for _, data in pieces)
        starts = [i for i in range(len(raw)) if raw.startswith(b"data: ", i)][:5]
        # An event has begun to come when its mark is whole.
        assert read.events == [(i + len(b"data: ") - 1) // cut for i in starts]
        assert (read.tier, read.ended) == ("gpu", pieces[-1][0])


@pytest.mark.parametrize("missing", [0, 1, 5, 6])
def test_the_serving_benchmark_takes_no_answer_with_a_hole(
    beside_benchmarks: None, missing: int
) -> None:
    from _serving_gpu_client import _take_apart

    events = answer(5)
    if missing < 5:
        events[5]["usage"]["completion_tokens"] -= 1
    del events[missing]
    with pytest.raises(RuntimeError, match="5 tokens"):
        _take_apart(0.0, stream(events, 64), 5)
