"""The official `openai` client against the running demo."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import openai
import pytest

from tests.e2e.oracle import Oracle
from tests.e2e.runs import DEMO
from tests.e2e.service import BASE, FOLDERS, Service, Tenant

pytestmark = [pytest.mark.timeout(400), pytest.mark.cluster]

EXACT = {"ignore_eos": True}  # as many tokens as max_tokens says
TOLERANCE = 1e-3  # of a logprob
SAMPLES: dict[str, dict[str, str]] = {
    adapter["name"]: adapter["samples"]
    for tenant in json.loads((DEMO / "demo_tenants.json").read_text())["tenants"]
    for adapter in tenant["adapters"]
}
PROMPTS = [*(s["completion"] for s in SAMPLES.values()), "The sea, 1851: naïve — or"]
QUESTION = [{"role": "user", "content": "Tell me about water."}]


@pytest.fixture(scope="module")
def acme(service: Service) -> Tenant:
    return service.owners["scripture"]


@pytest.mark.parametrize("model", [BASE, *FOLDERS])
def test_texts_are_those_of_transformers_and_peft(
    service: Service, oracle: Callable[[str], Oracle], model: str
) -> None:
    tenant = service.owners.get(model, service.any_tenant)
    reference = oracle(model)
    for prompt in PROMPTS:
        ids = reference.tokenizer(prompt).input_ids
        expected = reference.greedy(ids, 20)
        answer = tenant.openai.completions.create(
            model=model, prompt=prompt, max_tokens=20, temperature=0
        )
        assert answer.choices[0].text == reference.text(expected), prompt
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == len(expected)
        assert answer.choices[0].finish_reason == ("length" if len(expected) == 20 else "stop")


@pytest.mark.parametrize("model", [BASE, *FOLDERS])
def test_chats_are_those_of_transformers_and_peft(
    service: Service, oracle: Callable[[str], Oracle], model: str
) -> None:
    tenant = service.owners.get(model, service.any_tenant)
    reference = oracle(model)
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": SAMPLES.get(model, SAMPLES["devil"])["chat"]},
    ]
    ids = reference.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = reference.greedy(ids, 30)
    answer = tenant.openai.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=30,
        temperature=0,
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == reference.text(expected)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == len(ids) + len(expected)


def test_every_adapter_differs_from_the_base_and_from_the_others(service: Service) -> None:
    prompt = "What is the truth? "
    texts = {name: tenant.text(name, prompt) for name, tenant in service.owners.items()}
    texts[BASE] = service.any_tenant.text(BASE, prompt)
    assert len(set(texts.values())) == len(FOLDERS) + 1, texts


def test_a_streamed_completion_joins_to_the_whole_one(acme: Tenant) -> None:
    ask = {"model": "scripture", "prompt": "And it came to pass", "max_tokens": 40}
    whole = acme.openai.completions.create(**ask, temperature=0, extra_body=EXACT)
    with acme.openai.completions.create(
        **ask,
        temperature=0,
        extra_body=EXACT,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    pieces = [c.choices[0] for c in chunks if c.choices]
    assert len(pieces) > 3, "it came in one piece"
    assert "".join(p.text for p in pieces) == whole.choices[0].text
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["length"]
    assert pieces[-1].finish_reason == "length"
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert not chunks[-1].choices
    assert usage.completion_tokens == whole.usage.completion_tokens == 40
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_streamed_chat_joins_to_the_whole_one(acme: Tenant) -> None:
    ask = {"model": "scripture", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    whole = acme.openai.chat.completions.create(**ask)  # type: ignore[arg-type]
    with acme.openai.chat.completions.create(**ask, stream=True) as stream:  # type: ignore[arg-type]
        chunks = list(stream)
    deltas = [c.choices[0].delta for c in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_logprobs_of_a_completion(acme: Tenant, oracle: Callable[[str], Oracle]) -> None:
    prompt = "And it came to pass"
    answer = acme.openai.completions.create(
        model="scripture",
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        logprobs=3,
    )
    choice = answer.choices[0]
    shown = choice.logprobs
    assert shown is not None
    assert shown.tokens is not None
    assert shown.token_logprobs is not None
    assert shown.top_logprobs is not None
    assert "".join(shown.tokens) == choice.text
    reference = oracle("scripture")
    ids = reference.tokenizer(prompt).input_ids
    expected = reference.greedy(ids, 16)
    shown_tokens = len(expected) - (choice.finish_reason == "stop")  # the token that ends it
    assert len(shown.tokens) == shown_tokens > 5
    for token, logprob, top in zip(
        shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
        assert len(top) >= 3
    theirs = reference.logprobs(ids, expected)[:shown_tokens]
    assert shown.token_logprobs == pytest.approx(theirs, abs=TOLERANCE)
    assert shown.text_offset is not None
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_logprobs_of_a_streamed_chat(acme: Tenant) -> None:
    ask = {"model": "scripture", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    options = {"logprobs": True, "top_logprobs": 2}
    whole = acme.openai.chat.completions.create(**ask, **options).choices[0]  # type: ignore[arg-type]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert 5 < len(content) <= 16
    assert "".join(t.token for t in content) == whole.message.content
    assert all(t.logprob == t.top_logprobs[0].logprob for t in content)
    assert all(t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in content)
    with acme.openai.chat.completions.create(**ask, **options, stream=True) as stream:  # type: ignore[arg-type]
        streamed = [
            token
            for chunk in stream
            if chunk.choices and chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content or ()
        ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert sum(t.logprob for t in streamed) == pytest.approx(
        sum(t.logprob for t in content), abs=TOLERANCE
    )


def test_choices_and_seeds(acme: Tenant) -> None:
    def sample(seed: int, n: int = 1) -> openai.types.Completion:
        return acme.openai.completions.create(
            model="scripture",
            prompt="And the king said",
            max_tokens=12,
            temperature=1,
            seed=seed,
            n=n,
            extra_body=EXACT,
        )

    two = sample(7, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text != two.choices[1].text
    one = sample(7)
    assert one.choices[0].text == two.choices[0].text
    assert sample(8).choices[0].text != one.choices[0].text
    assert two.usage is not None
    assert one.usage is not None
    assert two.usage.prompt_tokens == one.usage.prompt_tokens, "a prompt counts once"
    assert two.usage.completion_tokens == 2 * one.usage.completion_tokens == 24


def test_streamed_choices_are_those_of_the_whole_answer(acme: Tenant) -> None:
    ask = {"model": "scripture", "messages": QUESTION, "max_tokens": 12, "seed": 5, "n": 2}
    whole = acme.openai.chat.completions.create(**ask)  # type: ignore[arg-type]
    texts, reasons = ["", ""], [None, None]
    usage = None
    with acme.openai.chat.completions.create(
        **ask,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.prompt_tokens == whole.usage.prompt_tokens, "a prompt counts once"
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_logit_bias_forces_a_token(acme: Tenant, oracle: Callable[[str], Oracle]) -> None:
    token = oracle(BASE).tokenizer(" king").input_ids[0]
    word = oracle(BASE).text([token])
    forced = acme.openai.completions.create(
        model="scripture", prompt="And the", max_tokens=4, logit_bias={str(token): 100}
    )
    assert forced.choices[0].text == word * 4
    # Every repetition costs 2 of a lead that the bias no longer makes endless.
    varied = acme.openai.completions.create(
        model="scripture",
        prompt="And the",
        max_tokens=30,
        temperature=0,
        logit_bias={str(token): 15},
        frequency_penalty=2,
        presence_penalty=1,
        extra_body={"repetition_penalty": 1.1, "min_p": 0.01, **EXACT},
    )
    assert varied.choices[0].text.count(word) < 30


SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "year": {"type": "integer", "minimum": 1000, "maximum": 1999},
        "kind": {"enum": ["psalm", "log", "proof"]},
    },
    "required": ["title", "year", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", [BASE, *FOLDERS])
def test_answers_follow_a_json_schema(service: Service, model: str) -> None:
    tenant = service.owners.get(model, service.any_tenant)
    form = {"type": "json_schema", "json_schema": {"name": "text", "schema": SCHEMA}}
    ask = {"model": model, "messages": QUESTION, "response_format": form, "seed": 3}
    whole = tenant.openai.chat.completions.create(**ask, n=2)  # type: ignore[arg-type]
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    with tenant.openai.chat.completions.create(**ask, stream=True) as stream:  # type: ignore[arg-type]
        text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert text == whole.choices[0].message.content


def test_answers_are_one_of_the_choices(acme: Tenant) -> None:
    choices = ["a whale", "a psalm"]
    text = acme.text("scripture", "It was", extra_body={"structured_outputs": {"choice": choices}})
    assert text in choices


def test_sampling_values_out_of_range_name_the_parameter(acme: Tenant) -> None:
    wrong = {
        "presence_penalty": 2.5,
        "frequency_penalty": -3,
        "repetition_penalty": 0,
        "min_p": 1.01,
        "logit_bias": {"4096": 1},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
    }
    for name, value in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            acme.text("scripture", "x", extra_body={name: value})
        assert refused.value.param == name
        assert refused.value.code in ("invalid_value", "invalid_grammar")


def test_a_stop_string_ends_the_text_before_it(acme: Tenant) -> None:
    prompt = "And it came to pass"
    text = acme.text("scripture", prompt, 30)
    stop = text[11:16]  # over the borders of tokens
    expected = text[: text.index(stop)]
    ask = {"model": "scripture", "prompt": prompt, "max_tokens": 30, "temperature": 0}
    answer = acme.openai.completions.create(**ask, stop=["\0never", stop])
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    with acme.openai.completions.create(**ask, stop=stop, stream=True) as stream:
        assert "".join(c.choices[0].text for c in stream if c.choices) == expected


def test_errors_are_those_of_the_openai_client(service: Service, acme: Tenant) -> None:
    stranger = acme.openai.with_options(api_key="lpx-" + "x" * 43)
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        stranger.models.list()
    assert wrong_key.value.code == "invalid_api_key"
    assert acme.http.get("/v1/models", headers={"authorization": ""}).status_code == 401
    with pytest.raises(openai.PermissionDeniedError):
        acme.openai.with_options(api_key=service.admin_key).models.list()

    with pytest.raises(openai.NotFoundError) as unknown:
        acme.text("no-such-model", "x")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    assert "no-such-model" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        acme.text("scripture@99", "x")

    with pytest.raises(openai.BadRequestError) as long:
        acme.text("scripture", "water " * 5000)
    assert long.value.code == "context_length_exceeded"
    assert "2048" in long.value.message
    with pytest.raises(openai.BadRequestError) as much:
        acme.text("scripture", "water", max_tokens=2048)
    assert much.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as streamed:
        acme.text("scripture", "water " * 5000, stream=True)
    assert streamed.value.code == "context_length_exceeded"

    with pytest.raises(openai.BadRequestError) as hot:
        acme.openai.completions.create(model="scripture", prompt="x", temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as misspelt:
        acme.text("scripture", "x", extra_body={"max_token": 3})
    assert misspelt.value.code == "unknown_parameter"


def test_the_whole_context_can_be_used(acme: Tenant, oracle: Callable[[str], Oracle]) -> None:
    ids = (oracle(BASE).tokenizer("And it came to pass. " * 500).input_ids)[:2038]
    answer = acme.openai.completions.create(
        model="scripture", prompt=ids, max_tokens=10, temperature=0, extra_body=EXACT
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048


def test_numbers_out_of_all_bounds(service: Service, acme: Tenant) -> None:
    huge = 10**30
    assert acme.text("scripture", "x", 4, extra_body={"top_k": huge})
    assert acme.text("scripture", "x", 4, seed=-huge)
    chat = {"model": "scripture", "messages": QUESTION}
    for wrong in ({"min_tokens": huge}, {"min_tokens": 2048}):
        with pytest.raises(openai.BadRequestError) as refused:
            acme.openai.chat.completions.create(**chat, extra_body=wrong)  # type: ignore[arg-type]
        assert refused.value.param == "min_tokens"
    limits = {"tokens_per_minute": 10**400}
    made = service.admin.post("/admin/v1/tenants", json={"name": "huge", "limits": limits})
    assert made.status_code == 400
    assert made.json()["error"]["param"] == "limits.tokens_per_minute"


def test_a_body_that_is_not_marked_as_json_is_told_so(acme: Tenant) -> None:
    response = acme.http.post("/v1/completions", content=b'{"model": "scripture"}')
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_huge_prompt_is_refused_as_any_that_is_too_long(acme: Tenant) -> None:
    body = {"model": "scripture", "prompt": "ab " * 1_000_000}
    refused = acme.http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
