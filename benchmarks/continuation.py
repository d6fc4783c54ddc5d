"""How often an answer that goes on at another group ends otherwise than it would have.

    python benchmarks/continuation.py                    # CPU, float32
    python benchmarks/continuation.py --dtype bfloat16   # a GPU, if there is one

When a group dies, its requests go on elsewhere from the tokens that came. In exact arithmetic they
end as they would have; rounding depends on what else is in a step, and on whether a token went
through the model alone or with its prompt. So each answer of the demo model and its adapters, many
in one batch, is cut at random, and its rest is generated again beside others. For comparison, the
same answers from their beginning, again beside others: what differs there has no fault behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _serving_engine import Asked, EngineAlone
from _serving_load import DemoFacts
from loraplex.workers import SamplingParams
from tokenizers import Tokenizer

OPENINGS = (
    "The day was", "In the beginning", "Tell me", "A ship", "My son,", "Once", "We the people",
    "It was a dark night, and", "The program", "He said to them", "Of all the",
)  # fmt: skip
KINDS = {"greedy": 0.0, "temperature 0.8": 0.8}


def make_asked(demo: DemoFacts, count: int, tokens: int, temperature: float) -> list[Asked]:
    """Requests over base and all adapters, no two alike."""
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    names = [None, *demo.adapters]
    asked = []
    for i in range(count):
        text = " ".join(random.sample(OPENINGS, random.randint(1, 4)))
        params = SamplingParams(
            max_tokens=tokens, temperature=temperature, seed=random.getrandbits(60), ignore_eos=True
        )
        prompt = tuple(tokenizer.encode(text).ids)
        asked.append((names[i % len(names)], prompt, (), params))
    return asked


def again(engine: EngineAlone, asked: Sequence[Asked]) -> list[list[int]]:
    """The answers, of requests in another order, so that others are beside each."""
    order = random.sample(range(len(asked)), len(asked))
    answers = engine.generate([asked[i] for i in order])
    return [answers[order.index(i)] for i in range(len(asked))]


def measure(engine: EngineAlone, elsewhere: EngineAlone, asked: list[Asked]) -> dict[str, Any]:
    """Answers that differ: gone on with elsewhere, and asked for anew there."""
    first = engine.generate(asked)
    cuts = [random.randrange(1, len(answer)) for answer in first]
    begun = [
        (name, prompt, tuple(answer[:cut]), params)
        for (name, prompt, _, params), answer, cut in zip(asked, first, cuts, strict=True)
    ]
    rests = again(elsewhere, begun)  # first: nothing of them is cached there
    whole = again(elsewhere, asked)
    went_on = [a[:cut] + rest for a, cut, rest in zip(first, cuts, rests, strict=True)]
    return {
        "answers": len(asked),
        "continued_otherwise": sum(a != b for a, b in zip(first, went_on, strict=True)),
        "asked_anew_otherwise": sum(a != b for a, b in zip(first, whole, strict=True)),
        "tokens_after_the_cut": sum(len(rest) for rest in rests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--answers", type=int, default=200, help="of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device")
    demo = DemoFacts.read()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        settings = {"dtype": args.dtype, "device": device}
        if device == "cpu":
            settings["torch_threads"] = os.cpu_count()
        folders = [Path(name) / part for part in ("here", "elsewhere")]
        for folder in folders:
            folder.mkdir()
        engine, elsewhere = (EngineAlone(demo, folder, **settings) for folder in folders)
        for kind, temperature in KINDS.items():
            asked = make_asked(demo, args.answers, args.tokens, temperature)
            rows[kind] = row = measure(engine, elsewhere, asked)
            print(
                f"{args.dtype} on {device}, {kind}: of {row['answers']} answers of {args.tokens} "
                f"tokens, {row['continued_otherwise']} went on otherwise, "
                f"{row['asked_anew_otherwise']} were otherwise when asked anew",
                flush=True,
            )
        engine.close()
        elsewhere.close()
    if args.out:
        machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        found = {"machine": machine, "date": date.today().isoformat(), "dtype": args.dtype}
        args.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
