"""An adapter's life over HTTP: published, replaced, rolled back, deleted while others answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from tests.e2e.service import BASE, Service, files_of

pytestmark = [pytest.mark.timeout(400), pytest.mark.cluster]

PROMPT = "In the beginning"


@contextmanager
def background(service: Service, models: tuple[str, ...]) -> Iterator[Callable[[], int]]:
    """Asks these models all the time; any failure, or an answer that differs, fails the test.

    The function it gives counts the answers so far.
    """
    owners = {m: service.owners.get(m, service.any_tenant) for m in models}
    expected = {m: owner.text(m, PROMPT) for m, owner in owners.items()}
    stop = threading.Event()
    wrong: list[str] = []
    counts = dict.fromkeys(models, 0)

    def ask(model: str) -> None:
        while not stop.is_set():
            try:
                text = owners[model].text(model, PROMPT)
                if text != expected[model]:
                    wrong.append(f"{model}: {text!r} instead of {expected[model]!r}")
            except Exception as error:
                wrong.append(f"{model}: {error!r}")
            counts[model] += 1

    threads = [threading.Thread(target=ask, args=(m,), daemon=True) for m in models]
    for thread in threads:
        thread.start()
    try:
        yield lambda: min(counts.values())
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert wrong == []
    assert min(counts.values()) > 0


def test_upload_new_version_rollback_delete_while_requests_run(service: Service) -> None:
    style = {name: service.owners[name].text(name, PROMPT) for name in ("whaler", "scripture")}
    with background(service, ("devil", "hacker", BASE)) as answered, service.tenant() as tenant:
        with pytest.raises(openai.NotFoundError):
            tenant.text("mine", PROMPT)
        first = tenant.publish("mine", "whaler")
        assert first["version"] == 1
        assert tenant.models() == [BASE, "mine"]
        assert tenant.text("mine", PROMPT) == style["whaler"]
        assert tenant.publish("mine", "whaler")["version"] == 1, "the same files again"

        # A stream that runs while the name moves stays with the version that it began with.
        options = {"max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
        ask = {"model": "mine", "prompt": PROMPT, **options}
        long = tenant.openai.completions.create(**ask).choices[0].text
        with tenant.openai.completions.create(**ask, stream=True) as stream:
            pieces = [next(iter(stream)).choices[0].text]
            second = tenant.publish("mine", "scripture")
            pieces += [c.choices[0].text for c in stream if c.choices]
        assert "".join(pieces) == long

        assert second["version"] == 2
        assert second["digest"] != first["digest"]
        assert tenant.text("mine", PROMPT) == style["scripture"]
        assert tenant.text("mine@1", PROMPT) == style["whaler"]
        assert tenant.text("mine@2", PROMPT) == style["scripture"]

        rolled = tenant.http.post("/v1/adapters/mine/rollback")
        assert rolled.status_code == 200
        assert rolled.json()["current_version"] == 1
        assert [v["version"] for v in rolled.json()["versions"]] == [1, 2]
        assert tenant.text("mine", PROMPT) == style["whaler"]
        assert tenant.text("mine@2", PROMPT) == style["scripture"]
        forward = tenant.http.post("/v1/adapters/mine/rollback", json={"version": 2})
        assert forward.json()["current_version"] == 2
        assert tenant.text("mine", PROMPT) == style["scripture"]
        missing = tenant.http.post("/v1/adapters/mine/rollback", json={"version": 3})
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "version_not_found"

        assert service.stored(f"tenants/{tenant.id}/blobs/")
        assert tenant.http.delete("/v1/adapters/mine").status_code == 204
        for model in ("mine", "mine@1", "mine@2"):
            with pytest.raises(openai.NotFoundError):
                tenant.text(model, PROMPT)
        assert tenant.models() == [BASE]
        assert service.stored(f"tenants/{tenant.id}/blobs/") == []
        assert tenant.http.delete("/v1/adapters/mine").status_code == 404

        # The name is free again, and nothing of its past comes back with it.
        tenant.publish("mine", "hacker")
        assert tenant.text("mine", PROMPT) == service.owners["hacker"].text("hacker", PROMPT)
        count = answered()
        deadline = time.monotonic() + 60
        while answered() == count:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_upload_by_presigned_urls(service: Service) -> None:
    config, weights = files_of("devil")
    with service.tenant() as tenant:
        made = tenant.http.post("/v1/adapters/uploads", json={"name": "mine"})
        assert made.status_code == 201, made.text
        upload = made.json()
        status = f"/v1/adapters/uploads/{upload['upload_id']}"
        assert tenant.http.post(f"{status}/complete").status_code == 409
        for field, data in (("config", config), ("weights", weights)):
            put = httpx.put(upload["urls"][field], content=data, trust_env=False)
            assert put.status_code == 200, put.text
        assert tenant.http.post(f"{status}/complete").status_code == 202
        deadline = time.monotonic() + 60
        while (record := tenant.http.get(status).json())["status"] == "processing":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert record["status"] == "ready", record
        expected = service.owners["devil"].text("devil", PROMPT)
        assert tenant.text("mine", PROMPT) == expected
        stranger = service.any_tenant.http
        assert stranger.get(status).status_code == 404
        assert stranger.post(f"{status}/complete").status_code == 404
        assert service.stored(f"quarantine/{tenant.id}/") == []


def test_a_stream_ends_well_when_its_adapter_is_deleted(service: Service) -> None:
    with service.tenant() as tenant:
        tenant.publish("mine", "hacker")
        ask = {"model": "mine", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
        whole = tenant.openai.completions.create(**ask, extra_body={"ignore_eos": True})
        with tenant.openai.completions.create(
            **ask, extra_body={"ignore_eos": True}, stream=True
        ) as stream:
            pieces = [next(iter(stream)).choices[0].text]
            assert tenant.http.delete("/v1/adapters/mine").status_code == 204
            pieces += [c.choices[0].text for c in stream if c.choices]
        assert "".join(pieces) == whole.choices[0].text
        with pytest.raises(openai.NotFoundError):
            tenant.text("mine", PROMPT)


def test_a_client_that_goes_away_frees_its_place(service: Service) -> None:
    tenant = service.any_tenant
    running = "loraplex_engine_running_requests"
    ask = {"model": BASE, "prompt": PROMPT, "max_tokens": 2000, "n": 4}
    with tenant.openai.completions.create(
        **ask, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        wait_for(lambda: sum(service.metric(running).values()) == 4)
    wait_for(lambda: sum(service.metric(running).values()) == 0, 5)


def wait_for(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
