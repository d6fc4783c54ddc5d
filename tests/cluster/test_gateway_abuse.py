"""Requests that are made to hurt: they get a clear error, and others don't feel them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from loraplex.adapter_store import DocumentError
from loraplex.cluster.errors import ApiError
from loraplex.cluster.gateway import adapters, app, completion, middleware, structured
from loraplex.cluster.gateway.chat_template import ChatTemplate
from loraplex.cluster.gateway.completions import CompletionShape
from loraplex.cluster.gateway.deps import COMPUTE_THREADS, STORE_THREADS
from loraplex.cluster.gateway.schemas import ChatBody, CompletionBody
from loraplex.workers import Grammar
from pydantic import ValidationError

from tests.cluster.gateway_fakes import BASE, Bench, make_bench
from tests.cluster.gateway_store import MemoryStore

MANY = 50_000


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = make_bench(MemoryStore())
    async with made.app.router.lifespan_context(made.app):
        yield made


async def post(bench: Bench, key: str, path: str, **body: Any) -> httpx.Response:
    async with bench.client(key) as client:
        return await client.post(f"/v1/{path}", json={"model": BASE, **body})


USER = [{"role": "user", "content": "a fox"}]
MANY_WRONG = [
    (CompletionBody, {"prompt": [None] * MANY}),
    (CompletionBody, {"prompt": ["a"] * MANY + [1]}),
    (CompletionBody, {"prompt": [[None] * 100] * (MANY // 100)}),
    (CompletionBody, {"prompt": "x", "stop": [1] * MANY}),
    (CompletionBody, {"prompt": "x", "stop_token_ids": ["1"] * MANY}),
    (ChatBody, {"messages": [1] * MANY}),
    (ChatBody, {"messages": USER * MANY}),
    (ChatBody, {"messages": [{"role": "user", "content": [1] * MANY}]}),
    (ChatBody, {"messages": [{"role": "user", "content": [{str(i): 1 for i in range(MANY)}]}]}),
    (ChatBody, {"messages": USER, "logit_bias": {str(i): "a" for i in range(MANY)}}),
    (ChatBody, {"messages": USER, "response_format": {str(i): "a" for i in range(MANY)}}),
    (ChatBody, {"messages": USER, "structured_outputs": {str(i): "a" for i in range(MANY)}}),
    (ChatBody, {"messages": USER, "structured_outputs": {"choice": [1] * MANY}}),
]


@pytest.mark.parametrize(("kind", "body"), MANY_WRONG, ids=[str(b)[:60] for _, b in MANY_WRONG])
def test_a_body_with_many_mistakes_makes_few_errors(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": BASE, **body})
    assert caught.value.error_count() <= 10


async def test_the_first_of_many_mistakes_is_named(bench):
    key = bench.tenant("acme").key
    for path, body, param in (
        ("completions", {"prompt": ["a", "b", 3, 4]}, "prompt.2"),
        ("chat/completions", {"messages": [*USER, 1, 2]}, "messages.1"),
        ("chat/completions", {"messages": USER, "logit_bias": {"5": 1, "6": 900}}, "logit_bias.6"),
        ("chat/completions", {"messages": USER, "response_format": {"typ": 1}}, "response_format"),
    ):
        response = await post(bench, key, path, **body)
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(param)


async def test_errors_stay_short_whatever_the_names_in_a_body(bench):
    key, name = bench.tenant("acme").key, "x" * 100_000
    for extra in (
        {name: 1},
        {"logit_bias": {name: "a"}},
        {"logit_bias": {name: 1}},
        {"response_format": {"type": "text", name: 1}},
        {"chat_template_kwargs": {name: 1}, "messages": [{**USER[0], name: 1}]},
        {"model": name},
    ):
        response = await post(bench, key, "chat/completions", **{"messages": USER, **extra})
        assert response.status_code in (400, 404)
        assert len(response.content) < 2000, response.text[:300]


async def test_token_ids_beyond_the_context_are_neither_checked_nor_echoed(bench, monkeypatch):
    key = bench.tenant("acme").key
    decoded: list[int] = []
    monkeypatch.setattr(
        type(bench.deps.tokenizer), "decode", lambda self, ids, **kw: decoded.append(len(ids)) or ""
    )
    response = await post(bench, key, "completions", prompt=[7] * 100_000, echo=True)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert decoded == []


@pytest.mark.parametrize("form", [{"json": "{"}, {"json": {"type": "oops"}}, {"regex": "(a"}])
async def test_the_field_that_gave_a_wrong_grammar_is_named(bench, form):
    key = bench.tenant("acme").key
    response = await post(bench, key, "completions", prompt="a", structured_outputs=form)
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_grammar", "structured_outputs")


@pytest.mark.parametrize(
    "source",
    ["{{ 1 // n }}", "{{ range(n * 10**9 + 10**9) | length }}", "{{ messages[n].x.y }}"],
)
def test_whatever_a_template_makes_of_its_variables_is_a_400(source):
    with pytest.raises(ApiError) as caught:
        ChatTemplate(source, {}).render(USER, n=0)
    assert caught.value.status == 400


async def test_the_logprobs_of_a_prompt_are_bounded(bench, monkeypatch):
    key = bench.tenant("acme").key
    monkeypatch.setattr(completion, "MAX_PROMPT_LOGPROBS", 60)
    asked = {"prompt": [7] * 20, "max_tokens": 1}
    for extra, param in (
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 3}, "logprobs"),
    ):
        error = (await post(bench, key, "completions", **asked, **extra)).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", param)
    assert bench.dispatcher.requests == []
    response = await post(bench, key, "completions", **asked, prompt_logprobs=2, logprobs=5)
    assert response.status_code == 200


async def test_choices_are_written_one_by_one(bench, monkeypatch):
    """The event loop turns between them."""
    key = bench.tenant("acme").key
    turns, seen = [0], []
    whole = CompletionShape.whole

    def watched(self: CompletionShape, events: Any) -> dict[str, Any]:
        seen.append(turns[0])
        return whole(self, events)

    async def turn() -> None:
        while True:
            await asyncio.sleep(0)
            turns[0] += 1

    monkeypatch.setattr(CompletionShape, "whole", watched)
    turning = asyncio.create_task(turn())
    response = await post(bench, key, "completions", prompt=["a", "b"], n=3, logprobs=2)
    turning.cancel()
    assert len(set(seen)) == 6
    assert [choice["index"] for choice in response.json()["choices"]] == [*range(6)]


async def test_a_flood_of_one_tenant_leaves_places_for_others():
    bench = make_bench(MemoryStore(), max_open_requests=9)
    flood, others = bench.tenant("flood"), [bench.tenant(f"t{i}") for i in range(4)]
    bench.dispatcher.gate = asyncio.Event()

    async def ask(key: str) -> httpx.Response:
        return await post(bench, key, "completions", prompt="a")

    async def opened(count: int) -> None:
        async with asyncio.timeout(10):
            while len(bench.dispatcher.requests) < count:
                await asyncio.sleep(0.01)

    open_ = [asyncio.create_task(ask(flood.key)) for _ in range(5)]
    await opened(5)
    refused = await ask(flood.key)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "gateway_overloaded"
    assert "you have 5 requests open" in refused.json()["error"]["message"]
    open_ += [asyncio.create_task(ask(other.key)) for other in others]
    await opened(9)
    bench.dispatcher.gate.set()
    assert [r.status_code for r in await asyncio.gather(*open_)] == [200] * 9
    assert (await ask(flood.key)).status_code == 200


async def test_half_a_body_is_not_waited_for_for_ever(bench, monkeypatch):
    key = bench.tenant("acme").key
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    monkeypatch.setattr(middleware, "BODY_BYTES_PER_S", 1e12)

    async def half(begin: bytes) -> AsyncIterator[bytes]:
        yield begin
        await asyncio.sleep(60)

    form = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na'
    async with bench.client(key) as client:
        for path, kind, begin in (
            ("completions", "application/json", b'{"model": "base'),
            ("adapters", "multipart/form-data; boundary=x", form),
        ):
            headers = {"content-type": kind}
            response = await client.post(f"/v1/{path}", content=half(begin), headers=headers)
            assert response.status_code == 408
            assert response.json()["error"]["code"] == "body_too_slow"


async def test_an_answer_may_take_longer_than_a_body(bench, monkeypatch):
    key = bench.tenant("acme").key
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    monkeypatch.setattr(middleware, "BODY_BYTES_PER_S", 1e12)
    bench.dispatcher.gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, bench.dispatcher.gate.set)
    response = await post(bench, key, "completions", prompt="a", stream=True)
    assert response.text.endswith("data: [DONE]\n\n")


async def test_long_prompts_and_grammars_keep_no_thread_from_the_store(bench, monkeypatch):
    tenant, go_on = bench.tenant("acme"), threading.Event()
    begun: list[str] = []

    def slow(*args: Any, **kw: Any) -> Any:
        begun.append("")
        go_on.wait(20)
        return [7]

    def never_wrong(grammar: Grammar) -> None:
        slow()

    monkeypatch.setattr(type(bench.deps.tokenizer), "encode", slow)
    monkeypatch.setattr(completion, "LONG_TEXT_CHARS", 0)
    monkeypatch.setattr(structured, "_compile_error", never_wrong)
    form = {"prompt": [7], "structured_outputs": {"regex": "a"}}
    asked = [
        asyncio.create_task(post(bench, tenant.key, "completions", **body))
        for body in [{"prompt": "a"}, form] * 20
    ]
    try:
        other = bench.tenant("other")  # its key isn't known here yet
        async with asyncio.timeout(10):
            while len(begun) < COMPUTE_THREADS:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # all the threads that they may have
        async with asyncio.timeout(5), bench.client(other.key) as client:
            assert (await client.get("/v1/models")).status_code == 200
        assert not go_on.is_set()
    finally:
        go_on.set()
        await asyncio.gather(*asked)


async def test_a_background_task_that_fails_is_begun_again(monkeypatch):
    monkeypatch.setattr(app, "RESTART_S", 0.01)
    bench, read = make_bench(MemoryStore(), catalogue_poll_s=0.01), 0

    def generation() -> str:
        nonlocal read
        read += 1
        if read == 2:
            raise DocumentError("the generation can't be read")
        return str(read)

    monkeypatch.setattr(bench.deps.catalogue, "generation", generation)
    watched = app.build_gateway(bench.deps)
    async with watched.router.lifespan_context(watched), asyncio.timeout(10):
        while read < 4:
            await asyncio.sleep(0.01)


async def test_a_tenant_has_so_many_uploads_open(bench, monkeypatch):
    monkeypatch.setattr(adapters, "TENANTS_UPLOADS", 2)
    tenants, go_on = [bench.tenant("acme"), bench.tenant("other")], asyncio.Event()
    coming: list[str] = []

    async def slow(tenant_id: str) -> AsyncIterator[bytes]:
        coming.append(tenant_id)
        yield b"--x\r\n"
        await go_on.wait()
        yield b"--x--\r\n"

    async def upload(tenant: Any) -> httpx.Response:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        async with bench.client(tenant.key) as client:
            return await client.post("/v1/adapters", content=slow(tenant.id), headers=headers)

    open_ = [asyncio.create_task(upload(t)) for t in tenants for _ in range(2)]
    async with asyncio.timeout(10):
        while len(coming) < 4:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        refused = await upload(tenants[0])
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_uploads"
    go_on.set()
    assert {r.status_code for r in await asyncio.gather(*open_)} == {400}
    assert (await upload(tenants[0])).status_code == 400


async def test_wrong_keys_are_throttled_however_many_come_at_once():
    bench = make_bench(MemoryStore(), unknown_keys_per_minute=5)

    async def ask(key: str) -> int:
        async with bench.client(key) as client:
            return (await client.get("/v1/models")).status_code

    bench.store.reads.clear()
    codes = await asyncio.gather(*(ask(f"lpx-{i:043}") for i in range(200)))
    assert codes.count(401) <= 5 + STORE_THREADS
    assert sum("keys/" in key for key in bench.store.reads) <= 5 + STORE_THREADS
    # Many that are right may come at once.
    bench = make_bench(MemoryStore(), unknown_keys_per_minute=5)
    tenants = [bench.tenant(f"t{i}") for i in range(40)]
    assert await asyncio.gather(*(ask(t.key) for t in tenants for _ in range(2))) == [200] * 80
