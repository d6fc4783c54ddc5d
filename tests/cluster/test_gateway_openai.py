"""The official `openai` client against a gateway on a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import uvicorn

from tests.cluster.gateway_fakes import BASE, Bench, default_answer, make_bench
from tests.cluster.gateway_store import MemoryStore
from tests.cluster.gateway_texts import raw_tokenizer


@pytest.fixture
async def served() -> AsyncIterator[tuple[Bench, str]]:
    bench = make_bench(MemoryStore())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(bench.app, log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield bench, f"http://127.0.0.1:{port}"
        server.should_exit = True
        await task


def client_for(url: str, key: str) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)


async def test_chat_and_its_stream(served):
    bench, url = served
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "style")
    async with client_for(url, tenant.key) as client:
        messages = [{"role": "user", "content": "hello"}]
        raw = await client.chat.completions.with_raw_response.create(
            model="style", messages=messages, seed=3, logprobs=True, top_logprobs=2
        )
        answer = raw.parse()
        assert raw.headers["x-loraplex-adapter"] == digest
        assert answer._request_id == raw.headers["x-request-id"]
        expected = raw_tokenizer().decode(default_answer(bench.dispatcher.requests[0]))
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob == -0.5
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        assert answer.model_extra["loraplex"]["adapter"] == digest
        stream = await client.chat.completions.create(
            model="style",
            messages=messages,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == expected
        assert usage.completion_tokens == answer.usage.completion_tokens


async def test_completions_and_models(served):
    bench, url = served
    tenant = bench.tenant("acme")
    async with client_for(url, tenant.key) as client:
        answer = await client.completions.create(
            model=BASE, prompt=["a", "b"], n=2, max_tokens=30, logprobs=1, extra_body={"top_k": 5}
        )
        assert len(answer.choices) == 4
        assert "".join(answer.choices[3].logprobs.tokens) == answer.choices[3].text
        assert bench.dispatcher.requests[0].sampling.top_k == 5
        parts = await client.completions.create(model=BASE, prompt="a", stream=True, seed=1)
        text = "".join([c.text async for part in parts for c in part.choices])
        ids = default_answer(bench.dispatcher.requests[-1])[:16]
        assert text == raw_tokenizer().decode(ids)
        assert [model.id async for model in client.models.list()] == [BASE]


async def test_errors_become_the_clients_exceptions(served):
    bench, url = served
    tenant = bench.tenant("acme", requests_per_minute=2)
    async with client_for(url, "lpx-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
        assert caught.value.code == "invalid_api_key"
    async with client_for(url, tenant.key) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="nothing", prompt="x")
        assert missing.value.code == "model_not_found"
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=BASE, prompt="x", max_tokens=100000)
        assert bad.value.code == "context_length_exceeded"
        assert bad.value.request_id
        bench.dispatcher.error_after = 2
        stream = await client.completions.create(model=BASE, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine broke"):
            async for _ in stream:
                pass
        bench.dispatcher.error_after = None
        await client.completions.create(model=BASE, prompt="x")
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(model=BASE, prompt="x")
        assert int(limited.value.response.headers["retry-after"]) >= 1


async def test_a_stream_that_is_closed_early_ends_the_work(served):
    bench, url = served
    tenant = bench.tenant("acme", tokens_per_minute=10_000)
    bench.dispatcher.gate = asyncio.Event()
    async with client_for(url, tenant.key) as client:
        bench.dispatcher.gate.set()
        stream = await client.completions.create(
            model=BASE, prompt="x", stream=True, max_tokens=300, n=2
        )
        async for _ in stream:
            bench.dispatcher.gate.clear()
            break
        await stream.close()
    async with asyncio.timeout(10):
        while len(bench.dispatcher.aborted) < 2:
            await asyncio.sleep(0.01)


async def test_a_hundred_streams_at_once(served):
    bench, url = served
    tenant = bench.tenant("acme")
    for k in range(5):
        bench.adapter(tenant, f"style-{k}")

    async def one(client: openai.AsyncOpenAI, k: int) -> tuple[str, str]:
        stream = await client.completions.create(
            model=f"style-{k % 5}", prompt=f"prompt {k}", seed=k, max_tokens=60, stream=True
        )
        text = "".join([c.text async for part in stream for c in part.choices])
        return f"prompt {k}", text

    async with client_for(url, tenant.key) as client:
        answers = dict(await asyncio.gather(*(one(client, k) for k in range(100))))
    for request in bench.dispatcher.requests:
        prompt = raw_tokenizer().decode(list(request.prompt_ids))
        assert answers[prompt] == raw_tokenizer().decode(default_answer(request)[:60])
