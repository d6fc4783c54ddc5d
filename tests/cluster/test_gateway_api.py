"""The REST API over HTTP, as clients of OpenAI's and vLLM's servers expect it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, get_args

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.cluster.gateway import TextTokenizer, respond
from loraplex.cluster.gateway.generation import STATUS
from loraplex.workers import ErrorCode, GenerationRequest, Grammar

from tests.cluster.gateway_fakes import BASE, Bench, default_answer, make_bench
from tests.cluster.gateway_store import MemoryStore
from tests.cluster.gateway_texts import EOS, raw_tokenizer, text_tokenizer


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = make_bench(MemoryStore())
    async with made.app.router.lifespan_context(made.app):
        yield made


async def post(
    bench: Bench, key: str, path: str, body: dict[str, Any], **kw: Any
) -> httpx.Response:
    async with bench.client(key) as client:
        return await client.post(path, json=body, **kw)


async def complete(bench: Bench, key: str, **body: Any) -> httpx.Response:
    return await post(bench, key, "/v1/completions", {"model": BASE, "prompt": "a fox", **body})


async def chat(bench: Bench, key: str, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hello fox"}]
    return await post(
        bench, key, "/v1/chat/completions", {"model": BASE, "messages": messages, **body}
    )


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; its end is checked."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, its shape checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


def text_of(request: GenerationRequest) -> str:
    return raw_tokenizer().decode(default_answer(request))


async def test_chat_answers_with_text_usage_and_the_adapter(bench):
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "style")
    response = await chat(bench, tenant.key, model="style", seed=7)
    assert response.status_code == 200, response.text
    body = response.json()
    request = bench.dispatcher.requests[0]
    assert request.adapter is not None
    assert (request.adapter.tenant_id, request.adapter.digest) == (tenant.id, digest)
    assert body["object"] == "chat.completion"
    assert body["model"] == "style"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == text_of(request)
    assert choice["finish_reason"] == "stop"
    prompt = "<|im_start|>user\nhello fox<|im_end|>\n<|im_start|>assistant\n"
    expected = text_tokenizer().encode(prompt, add_special_tokens=False)
    assert list(request.prompt_ids) == expected
    assert body["usage"] == {
        "prompt_tokens": len(expected),
        "completion_tokens": len(default_answer(request)),
        "total_tokens": len(expected) + len(default_answer(request)),
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert body["loraplex"] == {"adapter": digest, "version": 1, "tier": "gpu"}
    assert response.headers["x-loraplex-adapter"] == digest
    assert response.headers["x-request-id"]


async def test_the_base_model_answers_under_its_name(bench):
    tenant = bench.tenant("acme")
    response = await complete(bench, tenant.key, max_tokens=64)
    assert response.json()["loraplex"] == {"adapter": None, "version": None, "tier": "base"}
    assert response.headers["x-loraplex-adapter"] == "base"
    assert bench.dispatcher.requests[0].adapter is None


@pytest.mark.parametrize("step", [1, 3, 50])
async def test_streams_say_the_same_as_whole_answers(bench, step):
    tenant = bench.tenant("acme")
    bench.dispatcher.step = step
    for ask, field in ((chat, "delta"), (complete, "text")):
        common = {"seed": 5, "max_tokens": 40, "stop": ["日本", "nothing"], "n": 2}
        common["logprobs"] = True if ask is chat else 1
        whole = (await ask(bench, tenant.key, **common)).json()
        streamed = events(
            await ask(
                bench, tenant.key, stream=True, stream_options={"include_usage": True}, **common
            )
        )
        for index, choice in enumerate(whole["choices"]):
            parts = [c for e in streamed for c in e["choices"] if c["index"] == index]
            if field == "delta":
                text = "".join(p["delta"].get("content", "") for p in parts)
                assert parts[0]["delta"]["role"] == "assistant"
                assert text == choice["message"]["content"]
                logprobs = [t for p in parts if p["logprobs"] for t in p["logprobs"]["content"]]
                assert logprobs == choice["logprobs"]["content"]
            else:
                assert "".join(p["text"] for p in parts) == choice["text"]
                for name, values in choice["logprobs"].items():
                    assert [v for p in parts for v in p["logprobs"][name]] == values
            reasons = [p["finish_reason"] for p in parts]
            assert reasons[-1] == choice["finish_reason"] == "stop"
            assert all(reason is None for reason in reasons[:-1])
        assert streamed[-1]["choices"] == []
        assert streamed[-1]["usage"] == whole["usage"]
        assert all(e["usage"] is None for e in streamed[:-1])
        assert len({e["id"] for e in streamed}) == 1


async def test_without_include_usage_no_event_tells_usage(bench):
    tenant = bench.tenant("acme")
    streamed = events(await chat(bench, tenant.key, stream=True))
    assert all("usage" not in event for event in streamed)
    assert [e["loraplex"]["tier"] for e in streamed if "loraplex" in e] == ["base"]


async def test_stop_strings_cut_the_text_and_end_the_work(bench):
    tenant = bench.tenant("acme")
    response = await complete(bench, tenant.key, max_tokens=90, stop="日本", seed=1)
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text_of(bench.dispatcher.requests[0]).split("日本")[0]
    assert bench.dispatcher.aborted == [bench.dispatcher.requests[0].request_id]


async def test_max_tokens_ends_with_length(bench):
    tenant = bench.tenant("acme")
    body = (await complete(bench, tenant.key, max_tokens=3)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    body = (await chat(bench, tenant.key, max_completion_tokens=2)).json()
    assert body["usage"]["completion_tokens"] == 2


async def test_defaults_are_openais(bench):
    tenant = bench.tenant("acme")
    await complete(bench, tenant.key)
    await chat(bench, tenant.key)
    text, conversation = bench.dispatcher.requests
    assert text.sampling.max_tokens == 16
    assert conversation.sampling.max_tokens == 400 - len(conversation.prompt_ids)
    assert (text.sampling.temperature, text.sampling.top_p, text.sampling.top_k) == (1.0, 1.0, 0)
    assert text.sampling.logprobs is None


async def test_sampling_parameters_reach_the_group(bench):
    tenant = bench.tenant("acme")
    await complete(
        bench,
        tenant.key,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_tokens=2,
        max_tokens=9,
        seed=-3,
        ignore_eos=True,
        stop_token_ids=[5, 6],
        logprobs=4,
        user="someone",
    )
    sampling = bench.dispatcher.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 7)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (2, 9, True)
    assert sampling.stop_token_ids == (5, 6)
    assert sampling.logprobs == 4
    assert 0 <= sampling.seed < 2**63


async def test_a_request_without_a_seed_draws_one_for_itself(bench):
    tenant = bench.tenant("acme")
    for _ in range(3):
        await complete(bench, tenant.key)
    assert len({r.sampling.seed for r in bench.dispatcher.requests}) == 3


async def test_choices_have_seeds_of_their_own_that_repeat_with_the_request(bench):
    tenant = bench.tenant("acme")
    texts = []
    for _ in range(2):
        body = (await complete(bench, tenant.key, n=4, seed=11, max_tokens=60)).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
        texts.append([c["text"] for c in body["choices"]])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4
    assert bench.dispatcher.requests[0].sampling.seed == 11
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(bench.dispatcher.requests[0].prompt_ids)
    lengths = [len(default_answer(r)) for r in bench.dispatcher.requests[4:]]
    assert usage["completion_tokens"] == sum(min(60, n) for n in lengths)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a fox", 1), (["a", "b fox"], 2), ([10, 11, 12], 1), ([[10, 11], [12]], 2)],
)
async def test_prompts_come_as_texts_or_token_ids(bench, prompt, count):
    tenant = bench.tenant("acme")
    body = (await complete(bench, tenant.key, prompt=prompt, n=2, max_tokens=2)).json()
    assert [c["index"] for c in body["choices"]] == list(range(2 * count))
    sent = [list(r.prompt_ids) for r in bench.dispatcher.requests]
    if prompt == [[10, 11], [12]]:
        assert sent == [[10, 11], [10, 11], [12], [12]]
    assert body["usage"]["prompt_tokens"] == sum(len(p) for p in sent) // 2


async def test_echo_puts_the_prompt_first_with_its_logprobs(bench):
    tenant = bench.tenant("acme")
    for stream in (False, True):
        response = await complete(
            bench, tenant.key, prompt="Füße fox", echo=True, logprobs=2, max_tokens=4, stream=stream
        )
        if stream:
            parts = [c for e in events(response) for c in e["choices"]]
            text = "".join(p["text"] for p in parts)
            logprobs = {
                name: [v for p in parts for v in p["logprobs"][name]]
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            }
        else:
            choice = response.json()["choices"][0]
            text, logprobs = choice["text"], choice["logprobs"]
        assert text.startswith("Füße fox")
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(value is not None for value in logprobs["token_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert text[offset : offset + len(token)] == token


async def test_a_prompt_can_be_scored_without_generating(bench):
    tenant = bench.tenant("acme")
    body = (await complete(bench, tenant.key, echo=True, logprobs=0, max_tokens=0)).json()
    choice = body["choices"][0]
    assert choice["text"] == "a fox"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"


async def test_chat_logprobs_join_to_the_content(bench):
    tenant = bench.tenant("acme")
    body = (await chat(bench, tenant.key, logprobs=True, top_logprobs=3)).json()
    choice = body["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in content) == choice["message"]["content"]
    assert len(content) == body["usage"]["completion_tokens"] - 1  # not the end of the turn
    assert all(len(t["top_logprobs"]) == 3 for t in content)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.integers(1, 4))
async def test_any_text_streams_whole(text, step):
    made = make_bench(MemoryStore())
    tenant = made.tenant("acme")
    ids = [*text_tokenizer().encode(text), EOS]
    made.dispatcher.answer = lambda request: ids
    made.dispatcher.step = step
    streamed = events(await chat(made, tenant.key, stream=True))
    got = "".join(c["delta"].get("content", "") for e in streamed for c in e["choices"])
    # Special tokens written out by hand are special tokens.
    assert got == raw_tokenizer().decode(ids)


BAD_REQUESTS = [
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 99}, "invalid_value", "n"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 100000}, "context_length_exceeded", None),
    ({"stop": ["a"] * 99}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"min_tokens": 9, "max_tokens": 3}, "invalid_value", "min_tokens"),
    ({"stop_token_ids": [10**9]}, "invalid_value", "stop_token_ids"),
    ({"stream": "yes"}, "invalid_value", "stream"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"frequency_penalty": 2.1}, "invalid_value", "frequency_penalty"),
    ({"presence_penalty": False}, "invalid_value", "presence_penalty"),
    ({"presence_penalty": -2.01}, "invalid_value", "presence_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"min_p": 1.5}, "invalid_value", "min_p"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
    ({"logit_bias": {"05": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "invalid_value", "logit_bias"),
    ({"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
    ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
    (
        {"response_format": {"type": "json_schema"}},
        "invalid_value",
        "response_format.json_schema",
    ),
    *(
        (
            {"response_format": {"type": kind, "json_schema": {"name": "n", "schema": {}}}},
            "invalid_value",
            "response_format.json_schema",
        )
        for kind in ("text", "json_object")
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "oops"}}}},
        "invalid_grammar",
        "response_format",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x.json"}},
            }
        },
        "invalid_grammar",
        "response_format",
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "invalid_value",
        "response_format",
    ),
    ({"structured_outputs": {"regex": "a" * 40000}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"regex": "(a"}}, "invalid_grammar", "structured_outputs"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "invalid_value",
        "structured_outputs",
    ),
    ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "invalid_grammar", "structured_outputs"),
    (
        {"structured_outputs": {"grammar": "start: nothing"}},
        "invalid_grammar",
        "structured_outputs",
    ),
    ({"structured_outputs": {"json": "{"}}, "invalid_grammar", "structured_outputs"),
    ({"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
    ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    ({"best_of": 3}, "unsupported_parameter", "best_of"),
]


@pytest.mark.parametrize(
    ("body", "code", "param"), BAD_REQUESTS, ids=[str(b)[:80] for b, *_ in BAD_REQUESTS]
)
async def test_bad_requests_name_the_parameter(bench, body, code, param):
    tenant = bench.tenant("acme")
    for ask, field in ((chat, "messages"), (complete, "prompt")):
        error = error_of(await ask(bench, tenant.key, **body), 400)
        assert error["code"] == code
        assert error["param"] == (param or field)
        assert error["type"] == "invalid_request_error"
    assert bench.dispatcher.requests == []


async def test_neutral_values_of_unsupported_features_are_accepted(bench):
    tenant = bench.tenant("acme")
    response = await chat(
        bench,
        tenant.key,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        best_of=1,
        stop=None,
        n=None,
        temperature=None,
    )
    assert response.status_code == 200, response.text


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
FORMS = [
    ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
            }
        },
        Grammar("json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
    ),
    (
        {"structured_outputs": {"json": SCHEMA}},
        Grammar("json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
    ),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_schema", '{"type":"object"}')),
    ({"structured_outputs": {"regex": "[a-z]+"}}, Grammar("regex", "[a-z]+")),
    ({"structured_outputs": {"choice": ["x", "y z"]}}, Grammar("choice", '["x","y z"]')),
    ({"structured_outputs": {"grammar": 'root ::= "é"'}}, Grammar("grammar", 'root ::= "é"')),
    ({"response_format": {"type": "text"}}, None),
]


@pytest.mark.parametrize(("body", "grammar"), FORMS, ids=[str(b)[:60] for b, _ in FORMS])
async def test_forms_of_answers_reach_the_group(bench, body, grammar):
    tenant = bench.tenant("acme")
    for ask in (chat, complete):
        response = await ask(bench, tenant.key, **body)
        assert response.status_code == 200, response.text
        assert bench.dispatcher.requests[-1].sampling.grammar == grammar


async def test_penalties_filters_and_bias_reach_the_group(bench):
    tenant = bench.tenant("acme")
    asked = {
        "min_p": 0.25,
        "top_k": 7,
        "top_p": 0.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "seed": 11,
        "n": 3,
    }
    bias = {"5": 3, "9": -100.0, "12": 0}
    for ask in (chat, complete):
        bench.dispatcher.requests.clear()
        response = await ask(bench, tenant.key, **asked, logit_bias=bias, max_tokens=5)
        assert response.status_code == 200, response.text
        requests = bench.dispatcher.requests
        assert len({r.sampling.seed for r in requests}) == 3
        for request in requests:
            sampling = request.sampling
            assert sampling.logit_bias == ((5, 3.0), (9, -100.0))
            assert sampling.host_state
            for name in asked.keys() - {"n", "seed"}:
                assert getattr(sampling, name) == asked[name], name
            assert GenerationRequest.from_wire(request.to_wire()) == request


async def test_prompt_logprobs_are_listed_by_token_id(bench):
    tenant = bench.tenant("acme")
    for n in (1, 2):
        body = (await complete(bench, tenant.key, prompt_logprobs=2, n=n)).json()
        prompt = bench.dispatcher.requests[-1].prompt_ids
        for choice in body["choices"]:
            shown = choice["prompt_logprobs"]
            assert len(shown) == len(prompt)
            assert shown[0] is None
            for token, entry in zip(prompt[1:], shown[1:], strict=True):
                assert entry[str(token)]["logprob"] == -token / 100
                assert {"5", "6"} <= entry.keys() <= {"5", "6", str(token)}
                assert entry["5"]["decoded_token"] == text_tokenizer().token_name(5)
    body = (await chat(bench, tenant.key, prompt_logprobs=0)).json()
    prompt = bench.dispatcher.requests[-1].prompt_ids
    assert [set(e or ()) for e in body["prompt_logprobs"]] == [
        set(),
        *({str(token)} for token in prompt[1:]),
    ]
    assert "prompt_logprobs" not in (await chat(bench, tenant.key)).json()


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls"),
    ],
)
async def test_bad_messages_are_named(bench, messages, param):
    tenant = bench.tenant("acme")
    error = error_of(await chat(bench, tenant.key, messages=messages), 400)
    assert error["param"].startswith(param)


async def test_text_parts_are_joined_and_developers_are_system(bench):
    tenant = bench.tenant("acme")
    await chat(
        bench,
        tenant.key,
        messages=[
            {"role": "developer", "content": "be kind"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
    )
    shown = text_tokenizer().decode(
        bench.dispatcher.requests[0].prompt_ids, skip_special_tokens=False
    )
    assert "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nab<|im_end|>" in shown


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "missing_body"),
        (b"[]", "invalid_value"),
        (b"{}", "missing_parameter"),
    ],
)
async def test_bodies_that_are_no_request(bench, content, code):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/chat/completions", content=content, headers=headers)
    assert error_of(response, 400)["code"] == code


async def test_lone_surrogates_are_refused(bench):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        response = await client.post(
            "/v1/completions",
            content=b'{"model":"base-model","prompt":"\\ud800"}',
            headers={"content-type": "application/json"},
        )
    assert error_of(response, 400)["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ('{"json":{"const":"\\ud800"}}', "invalid_grammar"),
        ('{"json":{"minimum":NaN}}', "invalid_value"),
        ('{"json":' + '{"items":' * 300 + "{}" + "}" * 301, "invalid_grammar"),
        ('{"regex":"\\ud800"}', "invalid_grammar"),
        ('{"choice":["\\udfff"]}', "invalid_grammar"),
        ('{"grammar":"start: \\"\\ud800\\""}', "invalid_grammar"),
    ],
)
async def test_forms_that_only_look_like_text_are_refused(bench, form, code):
    tenant = bench.tenant("acme")
    body = '{"model":"base-model","prompt":"a fox","structured_outputs":' + form + "}"
    async with bench.client(tenant.key) as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/completions", content=body.encode(), headers=headers)
    assert error_of(response, 400)["code"] == code
    assert bench.dispatcher.requests == []


async def test_too_long_and_empty_prompts(bench):
    tenant = bench.tenant("acme")
    error = error_of(await complete(bench, tenant.key, prompt=[7] * 401), 400)
    assert error["code"] == "context_length_exceeded"
    assert "400" in error["message"]
    assert error_of(await complete(bench, tenant.key, prompt=""), 400)["param"] == "prompt"
    assert error_of(await complete(bench, tenant.key, prompt=[]), 400)["param"] == "prompt"
    assert error_of(await complete(bench, tenant.key, prompt=[-1]), 400)["param"] == "prompt"
    assert (await complete(bench, tenant.key, prompt=[7] * 399, max_tokens=1)).status_code == 200


async def test_a_prompt_that_cannot_fit_is_refused_without_being_tokenized(bench, monkeypatch):
    tenant = bench.tenant("acme")
    most = 400 * bench.deps.tokenizer.chars_per_token
    encoded: list[int] = []
    encode = TextTokenizer.encode

    def watched(self: TextTokenizer, text: str, **options: Any) -> list[int]:
        encoded.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(TextTokenizer, "encode", watched)
    for length in (most + 1, most):
        text = "é" * length
        for response, param in (
            (await complete(bench, tenant.key, prompt=text), "prompt"),
            (await complete(bench, tenant.key, prompt=["a", text]), "prompt"),
        ):
            error = error_of(response, 400)
            assert error["code"] == "context_length_exceeded"
            assert error["param"] == param
            assert "400 tokens" in error["message"]
        assert (length in encoded) == (length == most), "what may fit is tokenized"
    error = error_of(
        await chat(bench, tenant.key, messages=[{"role": "user", "content": "x" * most}]), 400
    )
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert max(encoded) == most


async def test_paths_and_methods_that_are_not_there(bench):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        assert error_of(await client.get("/v1/nothing"), 404)["code"] == "not_found"
        wrong = await client.get("/v1/completions")
        assert error_of(wrong, 405)["code"] == "method_not_allowed"


async def test_an_engines_error_before_the_first_token_is_a_status(bench):
    tenant = bench.tenant("acme")
    bench.dispatcher.error_after = 0
    bench.dispatcher.error = ("adapter_load_failed", "the pack is gone")
    for stream in (False, True):
        response = await chat(bench, tenant.key, stream=stream)
        error = error_of(response, 503)
        assert error["code"] == "adapter_load_failed"
        assert error["message"] == "the pack is gone"
        assert response.headers["retry-after"]


@pytest.mark.parametrize("code", get_args(ErrorCode))
async def test_every_error_code_has_a_status_of_its_own(bench, code):
    tenant = bench.tenant("acme")
    bench.dispatcher.error_after = 0
    bench.dispatcher.error = (code, f"{code} in words")
    status = STATUS[code]
    assert status != 500 or code in ("bad_request", "duplicate_request")
    error = error_of(await chat(bench, tenant.key), status)
    assert (error["code"], error["message"]) == (code, f"{code} in words")
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


async def test_an_engines_error_mid_stream_is_an_event_and_the_end(bench):
    tenant = bench.tenant("acme")
    bench.dispatcher.error_after = 3
    response = await chat(bench, tenant.key, stream=True)
    assert response.status_code == 200
    lines = response.text.strip().split("\n\n")
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_failed"
    assert "[DONE]" not in response.text
    whole = error_of(await chat(bench, tenant.key), 503)
    assert whole["code"] == "engine_failed"


async def test_one_failed_choice_ends_the_others(bench):
    tenant = bench.tenant("acme")
    bench.dispatcher.error_after = 2
    error_of(await complete(bench, tenant.key, n=3, max_tokens=20), 503)
    await asyncio.sleep(0)
    assert len(bench.dispatcher.requests) == 3


async def test_a_full_gateway_says_when_to_come_again_and_answers_probes():
    bench = make_bench(MemoryStore(), max_open_requests=3)
    tenant, *others = (bench.tenant(name) for name in ("acme", "b", "c"))
    bench.dispatcher.gate = asyncio.Event()
    open_ = [asyncio.create_task(chat(bench, t.key)) for t in (tenant, *others)]
    async with asyncio.timeout(10):
        while len(bench.dispatcher.requests) < 3:
            await asyncio.sleep(0.01)
    for stream in (False, True):
        response = await chat(bench, tenant.key, stream=stream)
        assert error_of(response, 503)["code"] == "gateway_overloaded"
        assert int(response.headers["retry-after"]) >= 1
    async with bench.client() as client:
        assert (await client.get("/ready")).status_code == 200
    bench.dispatcher.gate.set()
    assert [r.status_code for r in await asyncio.gather(*open_)] == [200] * 3
    assert (await chat(bench, tenant.key)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_the_work(bench, stream):
    tenant = bench.tenant("acme")
    bench.dispatcher.gate = asyncio.Event()
    if stream:  # one output, then silence
        bench.dispatcher.gate.set()
    body = {"model": BASE, "prompt": "x", "stream": stream, "max_tokens": 30}
    gone = asyncio.Event()
    sent: list[dict[str, Any]] = []
    parts = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for part in parts:
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if b"data" in message.get("body", b""):
            bench.dispatcher.gate.clear()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [
            (b"authorization", f"Bearer {tenant.key}".encode()),
            (b"content-type", b"application/json"),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    task = asyncio.create_task(bench.app(scope, receive, send))
    async with asyncio.timeout(10):
        while not bench.dispatcher.requests or (stream and not sent):
            await asyncio.sleep(0.01)
        assert not bench.dispatcher.aborted
        gone.set()
        await task
    assert bench.dispatcher.aborted == [bench.dispatcher.requests[0].request_id]


async def test_a_cancelled_request_ends_the_work(bench):
    tenant = bench.tenant("acme")
    bench.dispatcher.gate = asyncio.Event()
    task = asyncio.create_task(complete(bench, tenant.key, n=2))
    async with asyncio.timeout(10):
        while len(bench.dispatcher.requests) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    sent = {r.request_id for r in bench.dispatcher.requests}
    assert set(bench.dispatcher.aborted) == sent


async def test_a_silent_stream_sends_comments():
    made = make_bench(MemoryStore(), stream_keepalive_s=0.05)
    tenant = made.tenant("acme")
    made.dispatcher.gate = asyncio.Event()
    made.dispatcher.gate.set()

    def answer(request: GenerationRequest) -> list[int]:
        made.dispatcher.gate.clear()  # type: ignore[union-attr]
        asyncio.get_running_loop().call_later(0.3, made.dispatcher.gate.set)  # type: ignore[union-attr]
        return default_answer(request)

    made.dispatcher.answer = answer
    old, respond.FIRST_EVENT_S = respond.FIRST_EVENT_S, 0.01
    try:
        response = await chat(made, tenant.key, stream=True)
    finally:
        respond.FIRST_EVENT_S = old
    assert ": keep-alive\n\n" in response.text
    streamed = events(response)
    text = "".join(c["delta"].get("content", "") for e in streamed for c in e["choices"])
    assert text == text_of(made.dispatcher.requests[0])


async def test_request_ids_are_kept_when_they_are_harmless(bench):
    async with bench.client() as client:
        response = await client.get("/health", headers={"x-request-id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        response = await client.get("/health", headers={"x-request-id": "a b\tc"})
        assert response.headers["x-request-id"] not in ("", "a b\tc")


async def test_health_and_readiness(bench):
    async with bench.client() as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        bench.dispatcher.up = False
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "reason" in response.json()


async def test_metrics_are_not_on_the_tenants_port(bench):
    tenant = bench.tenant("acme")
    for key in (None, tenant.key, bench.admin_key):
        async with bench.client(key) as client:
            for path in ("/metrics", "/metrics/targets", "/v1/metrics", "/admin/v1/metrics"):
                assert (await client.get(path)).status_code in (401, 403, 404)


async def test_a_crash_is_an_error_object_with_the_request_id(bench):
    tenant = bench.tenant("acme")

    def crash(request: GenerationRequest) -> list[int]:
        raise RuntimeError("secret internals")

    bench.dispatcher.answer = crash
    response = await complete(bench, tenant.key)
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert response.headers["x-request-id"] in error["message"]


async def test_large_json_bodies_are_refused(bench):
    tenant = bench.tenant("acme")
    limit = bench.deps.settings.body_max_bytes
    assert error_of(await complete(bench, tenant.key, prompt="x" * limit), 413)["code"] == (
        "body_too_large"
    )

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(limit // 1_000_000 + 1):
            yield b"x" * 1_000_000

    async with bench.client(tenant.key) as client:  # no length is stated
        response = await client.post("/v1/completions", content=chunks())
    assert error_of(response, 413)["code"] == "body_too_large"


async def test_the_api_describes_itself(bench):
    async with bench.client() as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/adapters", "/admin/v1/tenants"} <= set(paths)


async def test_a_template_variable_may_have_any_name(bench):
    tenant = bench.tenant("acme")
    answer = await chat(bench, tenant.key, chat_template_kwargs={"self": 1})
    assert answer.status_code == 200, answer.text
