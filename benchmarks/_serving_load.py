"""What benchmarks/serving.py asks for: rounds of greedy requests over base and all adapters."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "deploy" / "demo"
REQUESTS = 32  # of one round, all at once where the system can
PROMPT_TOKENS = 24  # equal lengths: batching per adapter needs no padding
NEW_TOKENS = 48
_FIRST_PLAIN_TOKEN = 4  # those below are special


class AnswersDiffer(Exception):
    """A system didn't answer what transformers + PEFT answer one request at a time."""


@dataclass(frozen=True)
class DemoFacts:
    """The demo as demo_tenants.json lists it."""

    base_name: str
    model: Path
    adapters: dict[str, Path]  # by name

    @classmethod
    def read(cls) -> DemoFacts:
        raw = json.loads((DEMO / "demo_tenants.json").read_text())
        listed = [a for tenant in raw["tenants"] for a in tenant["adapters"]]
        return cls(
            raw["base"]["name"],
            DEMO / raw["base"]["folder"],
            {a["name"]: DEMO / a["folder"] for a in listed},
        )


@dataclass(frozen=True)
class Request:
    adapter: str | None  # None: the base model
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """Requests that are sent together."""

    requests: tuple[Request, ...]

    @property
    def tokens(self) -> int:
        return len(self.requests) * NEW_TOKENS


def check_equal(
    system: str, round_: Round, expected: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]]
) -> None:
    """Compares answers (ids or texts) by request.

    Raises:
        AnswersDiffer: naming the first request that differs, and where.
    """
    for i, (request, want, have) in enumerate(zip(round_.requests, expected, got, strict=True)):
        if want != have:
            pairs = enumerate(zip(want, have, strict=False))
            at = next((j for j, (a, b) in pairs if a != b), min(len(want), len(have)))
            raise AnswersDiffer(
                f"{system}: request {i} (adapter {request.adapter}) differs at {at}: expected "
                f"{want[at : at + 8]!r}, got {have[at : at + 8]!r} (lengths {len(want)} and "
                f"{len(have)})"
            )


def make_rounds(count: int, adapters: list[str], vocab: int, seed: int) -> list[Round]:
    """Rounds with prompts that no other round has, so that no prefix cache helps."""
    rng = random.Random(seed)
    names: list[str | None] = [None, *adapters]

    def request(i: int) -> Request:
        ids = (rng.randrange(_FIRST_PLAIN_TOKEN, vocab) for _ in range(PROMPT_TOKENS))
        return Request(names[i % len(names)], tuple(ids))

    return [Round(tuple(request(i) for i in range(REQUESTS))) for _ in range(count)]
