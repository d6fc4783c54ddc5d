"""Whatever an authenticated gateway says, it reaches at most the request that it says it of."""

from __future__ import annotations

import copy
import random
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from loraplex.workers import AdapterRef, GenerationRequest, Grammar, SamplingParams
from loraplex.workers.request_check import check_request

TENANT, DIGEST = "t-1", "0f" * 32
HOSTILE: list[Any] = [
    None, True, -1, 0, 3, 1 << 63, -(1 << 63), 0.5, -0.5, 1e300, float("nan"), float("inf"),
    "", "a", "../..", b"a", [], [1], [1.0], [True], ["a"], [None], [[1, 2.0]], [[1, 1e300]],
    [[5000, 1]], [["a", 1]], [[1]], ["regex", "a"], ["regex", 5], ["nothing", "("], {}, {"a": 1},
    [1 << 62], list(range(50)),
]  # fmt: skip


def request(name: str = "r") -> GenerationRequest:
    sampling = SamplingParams(max_tokens=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    return GenerationRequest(name, (10, 11), sampling, TENANT, traceparent="00-1-2-01")


def mutated(name: str) -> list[dict[str, Any]]:
    """The wire form with each field, of it or of its sampling, replaced by each hostile value."""
    made = []
    for place in (None, "sampling"):
        whole = request().to_wire()
        for key in [*(whole if place is None else whole[place]), "unknown"]:
            for value in HOSTILE:
                msg = copy.deepcopy(whole)
                (msg if place is None else msg[place])[key] = value
                msg["id"] = msg["id"] if key == "id" and place is None else f"{name}{len(made)}"
                made.append(msgpack.unpackb(msgpack.packb(msg)))
    return made


def test_all_that_can_be_asked_for_passes():
    sampling = SamplingParams(
        max_tokens=0,
        min_tokens=2,
        temperature=0,
        top_p=1,
        top_k=5,
        min_p=1,
        repetition_penalty=100,
        presence_penalty=-2,
        frequency_penalty=2.0,
        logit_bias=((1, 100), (2, -100.0)),
        seed=(1 << 63) - 1,
        logprobs=0,
        prompt_logprobs=20,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        grammar=Grammar("choice", '["x"]'),
    )
    given = GenerationRequest("r", (1,), sampling, TENANT, AdapterRef(TENANT, DIGEST), (5,))
    assert GenerationRequest.from_wire(msgpack.unpackb(msgpack.packb(given.to_wire()))) == given
    assert set(given.to_wire()["sampling"]) == {f.name for f in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("prompt", ["a"], "prompt must be a list of token ids"),
        ("prompt", [True], "prompt must be a list of token ids"),
        ("id", "i" * 513, "id must be a text of at most 512"),
        ("output", 5, "output must be a list of token ids, got 5"),
        ("adapter", "../" * 3, "adapter must be null or a sha256"),
        ("tenant", "../x", "tenant must be 1 to 128 letters"),
        ("traceparent", 5, "traceparent must be a text of at most 128"),
        ("traceparent", "t" * 129, "traceparent must be a text of at most 128"),
        ("sampling", [], "sampling must be a map, got list"),
        ("sampling.temperature", float("nan"), "temperature must be a number, 0 or more, got nan"),
        ("sampling.temperature", "hot", "sampling.temperature must be"),
        ("sampling.logit_bias", [["5", 1]], "logit_bias must be a list of"),
        ("sampling.grammar", ["regex"], r"grammar must be null or \[kind, text\]"),
        ("sampling.heat", 1, "there is no field sampling.'heat'"),
    ],
)
def test_what_is_wrong_is_named(place, value, words):
    msg = request().to_wire()
    check_request(msg)
    outer, _, inner = place.partition(".")
    (msg[outer] if inner else msg)[inner or outer] = value
    with pytest.raises(ValueError, match=words):
        check_request(msg)
    del msg["traceparent"], msg["prompt"]
    with pytest.raises(ValueError, match="'prompt' is missing"):
        check_request(msg)


def test_nothing_that_passes_the_check_raises_in_the_engine(make_engine):
    engine = make_engine(max_model_len=40)
    passed: dict[str, GenerationRequest] = {}
    for msg in mutated("m"):
        try:
            given = GenerationRequest.from_wire(msg)
        except ValueError:
            continue
        passed[given.request_id] = given
    assert len(passed) > 50
    ended: dict[str, str | None] = {}
    order = list(passed.values())
    random.Random().shuffle(order)
    for given in order:
        engine.submit(given)
    while engine.has_work():
        ended |= {o.request_id: o.error_code for o in engine.step() if o.finish_reason}
    assert set(ended) == set(passed)
    assert sum(code is None for code in ended.values()) > 30
