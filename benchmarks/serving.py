"""Tokens per second of Loraplex beside transformers + PEFT, on the demo model and its adapters.

    python benchmarks/serving.py

One run measures, in float32 with greedy answers of a fixed length:
  1. transformers + PEFT generating the requests one after another, each with its adapter,
  2. the same, with all requests of an adapter in one batch,
  3. Loraplex's engine alone in this process, all requests at once,
  4. `loraplex up` over HTTP, all requests at once; and the time from an upload's answer to the
     first token of the new adapter.
Repeats take turns between 1, 2 and 3, so that noise of the machine hits all of them. Every answer
of 2, 3 and 4 is compared with that of 1; a difference ends the benchmark with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _serving_engine import EngineAlone
from _serving_http import HttpRounds, first_token_times, service
from _serving_load import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    REQUESTS,
    AnswersDiffer,
    DemoFacts,
    Round,
    check_equal,
    make_rounds,
)
from _serving_peft import PeftModels
from transformers import AutoConfig
from transformers.utils import logging

PACKAGES = ("loraplex", "torch", "transformers", "peft", "ray")
UPLOADS = 5
ONE_BY_ONE = "1 transformers + PEFT, one by one"
PER_ADAPTER = "2 transformers + PEFT, per adapter"
ENGINE = "3 Loraplex engine alone"
HTTP = "4 Loraplex over HTTP"
Speeds = dict[str, list[float]]  # tokens/s of every repeat, by system


def in_process(
    demo: DemoFacts, warm_up: Round, rounds: list[Round], threads: int, speeds: Speeds
) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """Measures 1, 2 and 3. Returns details for the JSON, and the answers of 1 to each round."""
    torch.set_num_threads(threads)
    models = PeftModels(demo)
    probe = models.choose_implementation(warm_up)
    print(f"experts_implementation {models.implementation}", show(probe), flush=True)
    of_adapter: Speeds = {}
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineAlone(demo, Path(folder), torch_threads=threads)
        engine.run(warm_up)
        for number, round_ in enumerate(rounds):
            expected, by_adapter = models.one_by_one(round_)
            speeds[ONE_BY_ONE].append(round_.tokens / sum(by_adapter.values()))
            answers.append(expected)
            for name, seconds in by_adapter.items():
                count = sum(r.adapter == name for r in round_.requests)
                of_adapter.setdefault(name or "base", []).append(count * NEW_TOKENS / seconds)

            got, seconds = models.per_adapter(round_)
            speeds[PER_ADAPTER].append(round_.tokens / seconds)
            check_equal(PER_ADAPTER, round_, expected, got)

            got, seconds = engine.run(round_)
            speeds[ENGINE].append(round_.tokens / seconds)
            check_equal(ENGINE, round_, expected, got)
            print(f"repeat {number + 1}:", show({k: v[-1] for k, v in speeds.items() if v}))
            sys.stdout.flush()
        engine.close()
    details = {
        "experts_implementation": models.implementation,
        "probe_tokens_per_s": rounded(probe),
        "one_by_one_tokens_per_s": rounded(
            {name: statistics.median(values) for name, values in of_adapter.items()}
        ),
    }
    return details, answers


def over_http(
    demo: DemoFacts,
    warm_up: Round,
    rounds: list[Round],
    answers: list[list[list[int]]],
    speeds: Speeds,
    up_args: list[str],
) -> list[dict[str, Any]]:
    """Measures 4 and returns the uploads."""
    with service(up_args) as facts:
        http = HttpRounds(demo, facts)
        http.run(warm_up)  # pages the adapters in
        for round_, ids in zip(rounds, answers, strict=True):
            texts, seconds = http.run(round_)
            speeds[HTTP].append(round_.tokens / seconds)
            check_equal(HTTP, round_, http.texts(ids), texts)
        return first_token_times(demo, facts, UPLOADS)


def show(speeds: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:.1f}" for name, value in speeds.items()) + " tokens/s"


def rounded(speeds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in speeds.items()}


def print_table(speeds: Speeds) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items() if values}
    print(f"\n{'tokens/s':<38}{'median':>9}{'min':>9}{'max':>9}{'/ (1)':>8}{'/ (2)':>8}")
    for name, median in medians.items():
        low, high = min(speeds[name]), max(speeds[name])
        of_1, of_2 = median / medians[ONE_BY_ONE], median / medians[PER_ADAPTER]
        print(f"{name:<38}{median:9.1f}{low:9.1f}{high:9.1f}{of_1:8.1f}{of_2:8.1f}")
    print(
        f"\n{REQUESTS} requests a repeat of {PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens "
        "over the base and four adapters. Every answer of (2) to (4) equals that of (1)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for 1 to 3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--skip-http", action="store_true", help="leave out 4")
    parser.add_argument("up", nargs="*", help="more arguments of `loraplex up`, after --")
    args = parser.parse_args()
    # Batching is measured here, not paging: the demo's own pool can't hold its four adapters.
    os.environ.setdefault("LORAPLEX_POOL_BYTES", "64MiB")
    load = os.getloadavg()[0]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    demo = DemoFacts.read()
    vocab = AutoConfig.from_pretrained(demo.model).vocab_size
    warm_up, *rounds = make_rounds(args.repeats + 1, list(demo.adapters), vocab, args.seed)
    speeds: Speeds = {ONE_BY_ONE: [], PER_ADAPTER: [], ENGINE: [], HTTP: []}
    uploads: list[dict[str, Any]] = []
    try:
        details, answers = in_process(demo, warm_up, rounds, args.threads, speeds)
        if not args.skip_http:
            uploads = over_http(demo, warm_up, rounds, answers, speeds, args.up)
    except AnswersDiffer as error:
        sys.exit(f"error: {error}")
    print_table(speeds)
    result: dict[str, Any] = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cpus": os.cpu_count(),
        "load_average_before": round(load, 2),
        "threads": args.threads,
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "tokens_per_s": {k: [round(x, 2) for x in v] for k, v in speeds.items() if v},
        **details,
    }
    if uploads:
        first = statistics.median(u["first_token_s"] for u in uploads)
        print(f"\nupload answered to first token: median {first:.3f} s of {len(uploads)}")
        for u in uploads:
            print(
                f"  {u['adapter']:<12}upload {u['upload_s']:.2f} s, "
                f"then {u['first_token_s']:.3f} s to the first token"
            )
        result["first_token_after_upload_s"] = {"median": round(first, 3), "uploads": uploads}
    path = Path(__file__).parent / "results" / args.machine / "serving.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
