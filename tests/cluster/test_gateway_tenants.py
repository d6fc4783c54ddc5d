"""Keys, tenants, adapters, uploads and limits over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from loraplex.adapter_store import ObjectStore
from loraplex.cluster.gateway import auth, resolve

from tests.cluster.gateway_fakes import BASE, Bench, make_bench
from tests.cluster.gateway_store import MemoryStore

CONFIG = b'{"peft_type": "LORA"}'


async def started(made: Bench) -> AsyncIterator[Bench]:
    async with made.app.router.lifespan_context(made.app):
        yield made


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async for made in started(make_bench(MemoryStore(), catalogue_poll_s=0.05)):
        yield made


async def ask(bench: Bench, key: str | None, model: str = BASE, **body: Any) -> httpx.Response:
    async with bench.client(key) as client:
        return await client.post(
            "/v1/completions", json={"model": model, "prompt": "a fox", **body}
        )


def code_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


async def upload(
    bench: Bench, tenant: SimpleNamespace, name: str, weights: bytes = b"weights"
) -> httpx.Response:
    async with bench.client(tenant.key) as client:
        return await client.post(
            "/v1/adapters",
            data={"name": name},
            files={"config": ("c.json", CONFIG), "weights": ("w.safetensors", weights)},
        )


async def settled(bench: Bench) -> None:
    """Waits until this gateway has seen what another one changed."""
    await asyncio.sleep(0.15)


# Keys


async def test_keys_are_needed_and_checked(bench):
    tenant = bench.tenant("acme")
    assert code_of(await ask(bench, None), 401) == "missing_api_key"
    assert code_of(await ask(bench, "lpx-" + "x" * 43), 401) == "invalid_api_key"
    assert (await ask(bench, tenant.key)).status_code == 200
    async with bench.client() as client:
        for header in ("Basic abc", "Bearer", "Bearer  ", tenant.key):
            response = await client.get("/v1/models", headers={"authorization": header})
            assert code_of(response, 401) == "missing_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


async def test_tenant_and_admin_keys_stay_on_their_paths(bench):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        for path in ("/admin/v1/tenants", "/admin/v1/placement", "/admin/v1/anything"):
            assert code_of(await client.get(path), 403) == "admin_key_required"
    async with bench.client(bench.admin_key) as client:
        assert code_of(await client.get("/v1/models"), 403) == "tenant_key_required"
        assert (await client.get("/admin/v1/tenants")).status_code == 200


async def test_a_known_key_costs_no_read_of_the_store(bench):
    tenant = bench.tenant("acme")
    await ask(bench, tenant.key)
    # What the tenant's making changed is noticed once, in the first round at the latest.
    for _ in range(2):
        bench.store.reads.clear()
        for _ in range(5):
            await ask(bench, tenant.key)
        if all("generation" in key for key in bench.store.reads):
            return
    pytest.fail(f"a known key was read again: {bench.store.reads}")


async def test_an_unknown_key_costs_one_read_until_something_changes(bench):
    wrong = "lpx-" + "x" * 43
    bench.store.reads.clear()
    for _ in range(5):
        assert code_of(await ask(bench, wrong), 401) == "invalid_api_key"
    assert sum("keys/" in key for key in bench.store.reads) == 1


async def test_a_source_that_tries_keys_is_throttled_but_known_keys_go_on():
    made = make_bench(MemoryStore(), unknown_keys_per_minute=5)
    tenant = made.tenant("acme")
    assert (await ask(made, tenant.key)).status_code == 200
    codes = [(await ask(made, f"lpx-{i:043}")).status_code for i in range(10)]
    assert codes == [401] * 5 + [429] * 5
    response = await ask(made, "lpx-" + "z" * 43)
    assert code_of(response, 429) == "too_many_invalid_keys"
    assert int(response.headers["retry-after"]) >= 1
    assert (await ask(made, tenant.key)).status_code == 200


async def test_a_revoked_key_stops_working_soon(bench):
    tenant = bench.tenant("acme")
    assert (await ask(bench, tenant.key)).status_code == 200
    bench.catalogue.revoke_key(tenant.id, tenant.key_id)  # elsewhere
    await settled(bench)
    assert code_of(await ask(bench, tenant.key), 401) == "invalid_api_key"


async def test_known_keys_and_names_go_on_without_the_store_for_a_while(bench, monkeypatch):
    tenant, other = bench.tenant("acme"), bench.tenant("globex")
    bench.adapter(tenant, "style")
    assert (await ask(bench, tenant.key, "style")).status_code == 200
    bench.store.up = False
    await settled(bench)
    assert (await ask(bench, tenant.key, "style")).status_code == 200
    response = await ask(bench, other.key)  # never seen by this gateway
    assert code_of(response, 503) == "store_unavailable"
    assert response.headers["retry-after"]
    authenticator = next(
        m.kwargs["authenticator"] for m in bench.app.user_middleware if m.cls is auth.AuthMiddleware
    )
    grace_s = bench.deps.settings.auth_grace_s
    watch = authenticator._watch
    real = watch._clock
    monkeypatch.setattr(watch, "_clock", lambda: real() + grace_s + 1)
    assert code_of(await ask(bench, tenant.key, "style"), 503) == "store_unavailable"
    bench.store.up = True
    assert (await ask(bench, tenant.key, "style")).status_code == 200


async def test_one_read_serves_all_requests_that_wait_for_it(bench):
    tenant = bench.tenant("acme")
    await settled(bench)
    bench.store.reads.clear()
    await asyncio.gather(*(ask(bench, tenant.key) for _ in range(8)))
    assert sum(key.startswith("keys/") for key in bench.store.reads) == 1


# Isolation


async def test_a_tenant_can_neither_use_nor_see_anothers_adapter(bench):
    acme, globex = bench.tenant("acme"), bench.tenant("globex")
    bench.adapter(acme, "style")
    assert (await ask(bench, acme.key, "style")).status_code == 200
    theirs = await ask(bench, globex.key, "style")
    nobodys = await ask(bench, globex.key, "other")
    assert theirs.status_code == nobodys.status_code == 404
    assert (
        theirs.json()["error"]["message"].replace("style", "other")
        == (nobodys.json()["error"]["message"])
    )
    assert theirs.json()["error"]["code"] == "model_not_found"
    assert theirs.json()["error"]["param"] == "model"
    async with bench.client(globex.key) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [m["id"] for m in listed] == [BASE]
        assert (await client.get("/v1/adapters")).json()["data"] == []
        assert code_of(await client.get("/v1/models/style"), 404) == "model_not_found"
        for call in (
            client.get("/v1/adapters/style"),
            client.delete("/v1/adapters/style"),
            client.post("/v1/adapters/style/rollback", json={}),
        ):
            assert code_of(await call, 404) == "adapter_not_found"
    assert (await ask(bench, acme.key, "style")).status_code == 200


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("no", "'no'"),
        ("it's", "'it's'"),
        ('a "b"', "'a \"b\"'"),
        ("a\\b", "'a\\b'"),
        ("é日本", "'é日本'"),
        ("a\nb\u202e", "'a\\nb\\u202e'"),
        ("x" * 999, f"'{'x' * 200}...'"),
    ],
)
async def test_what_isnt_there_is_named_as_it_was_asked_for(bench, name, shown):
    tenant = bench.tenant("acme")
    path = quote(name, safe="")

    def message(response: httpx.Response) -> str:
        assert response.status_code == 404, response.text
        return response.json()["error"]["message"]

    no_model = f"the model {shown} does not exist or you do not have access to it; "
    no_adapter = f"you have no adapter named {shown}; "
    async with bench.client(tenant.key) as client:
        assert message(await ask(bench, tenant.key, name)).startswith(no_model)
        assert message(await client.get(f"/v1/models/{path}")).startswith(no_model)
        assert message(await client.get(f"/v1/adapters/{path}")).startswith(no_adapter)
        assert message(await client.delete(f"/v1/adapters/{path}")).startswith(no_adapter)
        upload = await client.get(f"/v1/adapters/uploads/{path}")
        assert message(upload) == f"you have no upload {shown}"
    async with bench.client(bench.admin_key) as client:
        no_tenant = f"there is no tenant {shown}"
        assert message(await client.get(f"/admin/v1/tenants/{path}")) == no_tenant
        assert message(await client.delete(f"/admin/v1/tenants/{path}")) == no_tenant
        key = await client.delete(f"/admin/v1/tenants/{tenant.id}/keys/{path}")
        assert message(key) == f"tenant {tenant.id} has no key {shown}"


@pytest.mark.parametrize(
    "model",
    ["", "no", "no@1", "style@9", "style@x", "../x", "a/b", "STYLE", "é", "\ud800", "x" * 999],
)
async def test_unknown_models_are_404_whatever_they_are_called(bench, model):
    tenant = bench.tenant("acme")
    bench.adapter(tenant, "style")
    async with bench.client(tenant.key) as client:
        content = json.dumps({"model": model, "prompt": "x"})
        response = await client.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
    assert code_of(response, 404) == "model_not_found"


# Models and versions


async def test_models_lists_the_base_and_ones_own_adapters(bench):
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "b-style")
    bench.adapter(tenant, "a-style")
    async with bench.client(tenant.key) as client:
        body = (await client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [m["id"] for m in body["data"]] == [BASE, "a-style", "b-style"]
        assert all(m["object"] == "model" and isinstance(m["created"], int) for m in body["data"])
        one = (await client.get("/v1/models/b-style@1")).json()
        assert (one["id"], one["digest"], one["parent"]) == ("b-style@1", digest, BASE)
        assert (await client.get(f"/v1/models/{BASE}")).json()["id"] == BASE


async def test_versions_rollback_and_delete(bench):
    tenant = bench.tenant("acme")
    first = (await upload(bench, tenant, "style", b"one")).json()["digest"]
    second = (await upload(bench, tenant, "style", b"two")).json()["digest"]

    async def served(model: str) -> str:
        response = await ask(bench, tenant.key, model)
        return response.json()["loraplex"]["adapter"]

    assert await served("style") == second
    assert (await served("style@1"), await served("style@2")) == (first, second)
    async with bench.client(tenant.key) as client:
        body = (await client.post("/v1/adapters/style/rollback")).json()
        assert (body["current_version"], body["digest"]) == (1, first)
        assert await served("style") == first
        again = await client.post("/v1/adapters/style/rollback")
        assert code_of(again, 404) == "version_not_found"
        body = (await client.post("/v1/adapters/style/rollback", json={"version": 2})).json()
        assert body["digest"] == second
        missing = await client.post("/v1/adapters/style/rollback", json={"version": 7})
        assert code_of(missing, 404) == "version_not_found"
        wrong = await client.post("/v1/adapters/style/rollback", json={"version": "x"})
        assert code_of(wrong, 400) == "invalid_value"
        shown = (await client.get("/v1/adapters/style")).json()
        assert [v["version"] for v in shown["versions"]] == [1, 2]
        assert shown["bytes"] == 1000
        assert (await client.delete("/v1/adapters/style")).status_code == 204
        assert code_of(await client.delete("/v1/adapters/style"), 404) == "adapter_not_found"
    assert code_of(await ask(bench, tenant.key, "style"), 404) == "model_not_found"
    assert set(bench.control.purged) == {f"{tenant.id}/{first}", f"{tenant.id}/{second}"}


async def test_content_that_another_name_still_has_is_not_purged(bench):
    tenant = bench.tenant("acme")
    for name in ("one", "two"):
        await upload(bench, tenant, name, b"same")
    async with bench.client(tenant.key) as client:
        assert (await client.delete("/v1/adapters/one")).status_code == 204
    assert bench.control.purged == []
    assert (await ask(bench, tenant.key, "two")).status_code == 200


async def test_deleting_works_while_the_controller_is_away(bench):
    tenant = bench.tenant("acme")
    await upload(bench, tenant, "one")
    bench.control.up = False
    async with bench.client(tenant.key) as client:
        assert (await client.delete("/v1/adapters/one")).status_code == 204


async def test_what_another_gateway_publishes_is_found_at_once_and_moved_soon(bench):
    tenant = bench.tenant("acme")
    assert code_of(await ask(bench, tenant.key, "style"), 404) == "model_not_found"
    await asyncio.sleep(resolve.REREAD_S)
    first = bench.adapter(tenant, "style", "one")
    response = await ask(bench, tenant.key, "style")
    assert response.json()["loraplex"]["adapter"] == first
    second = bench.adapter(tenant, "style", "two")
    await settled(bench)
    response = await ask(bench, tenant.key, "style")
    assert response.json()["loraplex"]["adapter"] == second


# Uploads


async def test_an_upload_answers_201_and_is_served_at_once(bench):
    tenant = bench.tenant("acme")
    response = await upload(bench, tenant, "style", b"tensor bytes")
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["name"] == "style"
    assert body["version"] == 1
    assert body["digest"] == hashlib.sha256(b"tensor bytes").hexdigest()
    assert body["rank_max"] == 8
    assert response.headers["location"] == "/v1/adapters/style"
    answer = await ask(bench, tenant.key, "style")
    assert answer.json()["loraplex"]["adapter"] == body["digest"]
    assert not list(bench.store.list("quarantine/"))


async def test_a_refused_upload_is_422_with_reason_and_key(bench):
    tenant = bench.tenant("acme")
    response = await upload(bench, tenant, "style", b"bad weights")
    error = response.json()["error"]
    assert code_of(response, 422) == "unknown_key"
    assert error["param"] == "x.y"
    assert "x.y" in error["message"]
    assert not list(bench.store.list("quarantine/"))
    assert code_of(await ask(bench, tenant.key, "style"), 404) == "model_not_found"


@pytest.mark.parametrize("name", ["", "UPPER", "a..b", "a@1", "a/b", "x" * 64, BASE])
async def test_names_outside_the_alphabet_are_422(bench, name):
    tenant = bench.tenant("acme")
    response = await upload(bench, tenant, name)
    assert code_of(response, 422) == ("name_reserved" if name == BASE else "invalid_name")
    assert not list(bench.store.list("quarantine/"))


async def test_forms_with_something_missing_or_too_much(bench):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:

        async def send(data: dict[str, str], files: dict[str, bytes]) -> str:
            parts = {name: (name, content) for name, content in files.items()}
            response = await client.post("/v1/adapters", data=data, files=parts)
            return code_of(response, 400)

        both = {"config": CONFIG, "weights": b"w"}
        assert await send({}, both) == "missing_parameter"
        assert await send({"name": "a"}, {"config": CONFIG}) == "missing_parameter"
        assert await send({"name": "a"}, {"weights": b"w"}) == "missing_parameter"
        assert await send({"name": "a", "rank": "8"}, both) == "unknown_parameter"
        response = await client.post("/v1/adapters", json={"name": "a"})
        assert response.status_code == 400
        response = await client.post(
            "/v1/adapters", content=b"x", headers={"content-type": "multipart/form-data"}
        )
        assert response.status_code == 400


async def test_uploads_over_the_cap_are_413_and_name_the_other_way():
    made = make_bench(MemoryStore(), upload_max_bytes=5000)
    tenant = made.tenant("acme")
    assert (await upload(made, tenant, "style", b"x" * 5000)).status_code == 201
    assert code_of(await upload(made, tenant, "style", b"x" * 5001), 413) == "body_too_large"
    response = await upload(made, tenant, "style", b"x" * (3 << 20))
    assert code_of(response, 413) == "body_too_large"
    assert "/v1/adapters/uploads" in response.json()["error"]["message"]


async def test_a_tenant_may_have_so_many_adapters(bench):
    tenant = bench.tenant("acme", max_adapters=1)
    assert (await upload(bench, tenant, "one")).status_code == 201
    assert code_of(await upload(bench, tenant, "two"), 403) == "limit_exceeded"
    assert (await upload(bench, tenant, "one", b"newer")).status_code == 201
    assert not list(bench.store.list("quarantine/"))


async def test_the_presigned_way_on_a_real_store(store: ObjectStore):
    async for bench in started(make_bench(store)):
        tenant, other = bench.tenant("acme"), bench.tenant("globex")
        async with bench.client(tenant.key) as client, httpx.AsyncClient() as outside:
            begun = (await client.post("/v1/adapters/uploads", json={"name": "big"})).json()
            assert (begun["status"], begun["headers"]) == ("waiting", {})
            path = f"/v1/adapters/uploads/{begun['upload_id']}"
            early = await client.post(f"{path}/complete")
            assert code_of(early, 409) == "upload_incomplete"
            for part, data in (("config", CONFIG), ("weights", b"presigned weights")):
                put = await outside.put(begun["urls"][part], content=data)
                assert put.status_code == 200, put.text
            async with bench.client(other.key) as stranger:
                assert code_of(await stranger.get(path), 404) == "upload_not_found"
                assert code_of(await stranger.post(f"{path}/complete"), 404) == "upload_not_found"
            response = await client.post(f"{path}/complete")
            assert response.status_code == 202
            assert response.json()["status"] == "processing"
            again = await client.post(f"{path}/complete")  # starts nothing a second time
            assert again.status_code == 202
            await asyncio.gather(*bench.ingest.tasks)
            assert len(bench.ingest.tasks) == 1
            done = (await client.get(path)).json()
            assert done["status"] == "ready"
            digest = hashlib.sha256(b"presigned weights").hexdigest()
            assert done["adapter"]["digest"] == digest
            answer = await ask(bench, tenant.key, "big")
            assert answer.json()["loraplex"]["adapter"] == digest


async def test_a_refused_presigned_upload_says_why(bench):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        begun = (await client.post("/v1/adapters/uploads", json={"name": "big"})).json()
        bench.deps.uploads.stage(tenant.id, begun["upload_id"], CONFIG, b"bad")
        path = f"/v1/adapters/uploads/{begun['upload_id']}"
        await client.post(f"{path}/complete")
        await asyncio.gather(*bench.ingest.tasks)
        body = (await client.get(path)).json()
    assert body["status"] == "refused"
    assert body["error"] == {
        "code": "unknown_key",
        "message": "tensor 'x.y' is unknown",
        "key": "x.y",
    }
    assert not list(bench.store.list("quarantine/"))


async def test_an_upload_that_lost_its_worker_can_be_completed_again(bench):
    tenant = bench.tenant("acme")
    record, _ = bench.deps.uploads.create(tenant.id, "big")
    begin = bench.deps.uploads.begin
    assert begin(tenant.id, record.upload_id)[1]
    assert not begin(tenant.id, record.upload_id)[1]
    real = bench.deps.uploads._clock
    bench.deps.uploads._clock = lambda: real() + 901
    assert begin(tenant.id, record.upload_id)[1]


@pytest.mark.parametrize("upload_id", ["x", "0" * 32, "..%2f..", "0" * 31 + "G"])
async def test_upload_ids_that_are_none(bench, upload_id):
    tenant = bench.tenant("acme")
    async with bench.client(tenant.key) as client:
        assert (await client.get(f"/v1/adapters/uploads/{upload_id}")).status_code == 404


async def test_presigned_sizes_are_bounded(bench):
    tenant = bench.tenant("acme")
    body = {"name": "big", "weights_bytes": 10**12}
    async with bench.client(tenant.key) as client:
        assert code_of(await client.post("/v1/adapters/uploads", json=body), 413) == (
            "body_too_large"
        )


# Limits


async def test_requests_per_minute(bench):
    tenant, free = bench.tenant("acme", requests_per_minute=3), bench.tenant("globex")
    responses = [await ask(bench, tenant.key) for _ in range(4)]
    assert [r.status_code for r in responses] == [200, 200, 200, 429]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in responses] == ["2", "1", "0", "0"]
    assert responses[0].headers["x-ratelimit-limit-requests"] == "3"
    refused = responses[-1]
    assert code_of(refused, 429) == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) == 20
    bench.clock.now += 20
    assert (await ask(bench, tenant.key)).status_code == 200
    unlimited = await ask(bench, free.key)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


async def test_tokens_per_minute_are_settled_with_the_true_usage(bench):
    tenant = bench.tenant("acme", tokens_per_minute=300)
    prompt = len(bench.deps.tokenizer.encode("a fox"))
    used = 0
    for stream in (False, True, False, True):  # 200 are reserved each time, few are used
        response = await ask(bench, tenant.key, max_tokens=200, stream=stream)
        assert response.status_code == 200
        used += prompt + len(bench.dispatcher.answer(bench.dispatcher.requests[-1]))
        if 300 - used < 200 + prompt:
            break
    refused = await ask(bench, tenant.key, max_tokens=200)
    assert code_of(refused, 429) == "rate_limit_exceeded"
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) <= 300
    small = await ask(bench, tenant.key, max_tokens=5)
    assert int(small.headers["x-ratelimit-remaining-tokens"]) == 300 - used - prompt - 5


async def test_a_request_larger_than_a_minutes_budget(bench):
    tenant = bench.tenant("acme", tokens_per_minute=50)
    response = await ask(bench, tenant.key, max_tokens=60)
    assert code_of(response, 429) == "request_too_large"
    assert "retry-after" not in response.headers
    assert (await ask(bench, tenant.key, max_tokens=5)).status_code == 200


async def test_a_failed_request_is_not_charged(bench):
    tenant = bench.tenant("acme", tokens_per_minute=100)
    bench.dispatcher.error_after = 0
    for _ in range(5):
        assert (await ask(bench, tenant.key, max_tokens=60)).status_code == 503


async def test_refused_parameters_cost_no_budget(bench):
    tenant = bench.tenant("acme", requests_per_minute=1)
    assert (await ask(bench, tenant.key, temperature=9)).status_code == 400
    assert (await ask(bench, tenant.key, "nothing")).status_code == 404
    assert (await ask(bench, tenant.key)).status_code == 200


# Fairness


async def test_weight_priority_and_time_to_begin_go_to_the_group(bench):
    tenant = bench.tenant("acme", weight=2.5)
    assert (await ask(bench, tenant.key, priority=-3, queue_timeout=1.5)).status_code == 200
    sent = bench.dispatcher.requests[-1]
    assert (sent.tenant_id, sent.weight, sent.priority) == (tenant.id, 2.5, -3)
    assert sent.timeout_s == 1.5
    assert (await ask(bench, tenant.key)).status_code == 200
    sent = bench.dispatcher.requests[-1]
    assert (sent.priority, sent.timeout_s) == (0, None)
    async with bench.client(bench.admin_key) as admin:
        body = {"limits": {"weight": 0.5}}
        assert (await admin.patch(f"/admin/v1/tenants/{tenant.id}", json=body)).status_code == 200
    assert (await ask(bench, tenant.key)).status_code == 200
    assert bench.dispatcher.requests[-1].weight == 0.5


@pytest.mark.parametrize(
    "body",
    [
        {"priority": 0.5},
        {"priority": 2**31},
        {"priority": "high"},
        {"queue_timeout": 0},
        {"queue_timeout": -1},
        {"queue_timeout": "5"},
    ],
)
async def test_priorities_and_timeouts_that_are_none_are_refused(bench, body):
    tenant = bench.tenant("acme")
    response = await ask(bench, tenant.key, **body)
    assert code_of(response, 400) == "invalid_value"
    assert response.json()["error"]["param"] == next(iter(body))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_wasnt_begun_in_its_time_is_504_and_costs_nothing(bench, stream):
    tenant = bench.tenant("acme", tokens_per_minute=100)
    bench.dispatcher.error_after = 0
    bench.dispatcher.error = ("deadline_exceeded", "not begun within its queue_timeout of 1 s")
    for _ in range(3):
        response = await ask(bench, tenant.key, max_tokens=60, queue_timeout=1, stream=stream)
        assert code_of(response, 504) == "deadline_exceeded"
        assert "queue_timeout" in response.json()["error"]["message"]


# Admin


async def test_tenants_and_keys_by_the_admin(bench):
    async with bench.client(bench.admin_key) as admin:
        made = await admin.post(
            "/admin/v1/tenants", json={"name": "acme", "limits": {"requests_per_minute": 2}}
        )
        assert made.status_code == 201
        tenant = made.json()
        assert tenant["limits"]["requests_per_minute"] == 2
        assert tenant["limits"]["tokens_per_minute"] is None
        again = await admin.post("/admin/v1/tenants", json={"name": "acme"})
        assert code_of(again, 409) == "tenant_exists"
        bad = await admin.post("/admin/v1/tenants", json={"name": "Not Ok"})
        assert code_of(bad, 422) == "invalid_name"
        path = f"/admin/v1/tenants/{tenant['id']}"
        key = (await admin.post(f"{path}/keys", json={"label": "laptop"})).json()
        assert (await ask(bench, key["key"])).status_code == 200
        listed = (await admin.get(f"{path}/keys")).json()["data"]
        assert [(k["id"], k["label"]) for k in listed] == [(key["id"], "laptop")]
        assert key["key"] not in str(listed)
        body = {"limits": {"requests_per_minute": None, "tokens_per_minute": 7}}
        changed = (await admin.patch(path, json=body)).json()
        assert changed["limits"]["requests_per_minute"] is None
        assert changed["limits"]["tokens_per_minute"] == 7
        assert (await admin.get(path)).json() == changed
        assert [t["name"] for t in (await admin.get("/admin/v1/tenants")).json()["data"]] == [
            "acme"
        ]
        response = await ask(bench, key["key"], max_tokens=20)  # the new limit, at once
        assert code_of(response, 429) == "request_too_large"
        assert (await admin.delete(f"{path}/keys/{key['id']}")).status_code == 204
        assert code_of(await ask(bench, key["key"]), 401) == "invalid_api_key"
        gone = await admin.delete(f"{path}/keys/{key['id']}")
        assert code_of(gone, 404) == "key_not_found"


async def test_a_deleted_tenant_is_gone_with_its_adapters(bench):
    tenant = bench.tenant("acme")
    digest = bench.adapter(tenant, "style")
    assert (await ask(bench, tenant.key, "style")).status_code == 200
    async with bench.client(bench.admin_key) as admin:
        path = f"/admin/v1/tenants/{tenant.id}"
        assert (await admin.delete(path)).status_code == 204
        assert code_of(await admin.get(path), 404) == "tenant_not_found"
        for call in (
            admin.delete(path),
            admin.get(f"{path}/keys"),
            admin.post(f"{path}/keys"),
            admin.patch(path, json={"limits": {}}),
        ):
            assert code_of(await call, 404) == "tenant_not_found"
    assert code_of(await ask(bench, tenant.key, "style"), 401) == "invalid_api_key"
    assert bench.control.purged == [f"{tenant.id}/{digest}"]


async def test_limits_out_of_bounds_are_refused(bench):
    async with bench.client(bench.admin_key) as admin:
        for limits in ({"requests_per_minute": 0}, {"weight": -1}, {"what": 1}):
            response = await admin.post("/admin/v1/tenants", json={"name": "a", "limits": limits})
            assert code_of(response, 400) == "invalid_value"


async def test_placement_comes_from_the_controller(bench):
    async with bench.client(bench.admin_key) as admin:
        assert (await admin.get("/admin/v1/placement")).json() == {"groups": []}
        bench.control.up = False
        response = await admin.get("/admin/v1/placement")
        assert code_of(response, 503) == "controller_unavailable"
