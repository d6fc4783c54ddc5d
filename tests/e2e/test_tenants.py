"""Tenants apart: names, adapters and rates of one are nothing to the others."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.e2e.service import BASE, Service, Tenant

pytestmark = [pytest.mark.timeout(400), pytest.mark.cluster]


def error_of(tenant: Tenant, method: str, path: str, name: str, **body: object) -> tuple:
    """Status and body of an answer, with the name that was asked for taken out."""
    response = tenant.http.request(method, path.format(name=name), **body)  # type: ignore[arg-type]
    return response.status_code, response.text.replace(name, "NAME")


def test_each_tenant_sees_the_base_model_and_its_own_adapters(service: Service) -> None:
    for tenant in service.tenants.values():
        own = sorted(name for name, owner in service.owners.items() if owner is tenant)
        assert tenant.models() == [BASE, *own]
        assert tenant.adapters() == own


def test_another_tenants_adapter_is_as_unknown_as_one_that_does_not_exist(
    service: Service,
) -> None:
    ways = [
        ("GET", "/v1/models/{name}", None),
        ("GET", "/v1/adapters/{name}", None),
        ("DELETE", "/v1/adapters/{name}", None),
        ("POST", "/v1/adapters/{name}/rollback", {}),
        ("POST", "/v1/completions", {"prompt": "x"}),
        ("POST", "/v1/completions", {"prompt": "x", "stream": True}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ]
    before = {name: tenant.text(name, "What is") for name, tenant in service.owners.items()}
    for name, owner in service.owners.items():
        for stranger in service.tenants.values():
            if stranger is owner:
                continue
            for method, path, body in ways:
                answers = [
                    error_of(
                        stranger,
                        method,
                        path,
                        model,
                        json={**body, "model": model} if body and "rollback" not in path else body,
                    )
                    for model in (name, "no-such-adapter")
                ]
                assert answers[0] == answers[1], (method, path)
                assert answers[0][0] == 404, (method, path)
            with pytest.raises(openai.NotFoundError) as refused:
                stranger.text(f"{name}@1", "x")
            assert refused.value.code == "model_not_found"
    after = {name: tenant.text(name, "What is") for name, tenant in service.owners.items()}
    assert after == before


def test_the_same_name_means_each_tenants_own_adapter(service: Service) -> None:
    with service.tenant() as one, service.tenant() as two:
        one.publish("mine", "scripture")
        two.publish("mine", "whaler")
        prompt = "In the beginning"
        expected = [service.owners[name].text(name, prompt) for name in ("scripture", "whaler")]
        assert [one.text("mine", prompt), two.text("mine", prompt)] == expected
        assert one.http.delete("/v1/adapters/mine").status_code == 204
        assert two.text("mine", prompt) == expected[1]


def test_requests_per_minute(service: Service) -> None:
    with service.tenant(requests_per_minute=3) as limited, service.tenant() as other:
        for _ in range(3):
            limited.text(BASE, "x", 1)
        with pytest.raises(openai.RateLimitError) as refused:
            limited.text(BASE, "x", 1)
        headers = refused.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 20  # a third of a minute for each request
        assert refused.value.code == "rate_limit_exceeded"
        assert "3 requests per minute" in refused.value.message
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError):
            limited.text(BASE, "x", 1, stream=True)
        assert limited.models() == [BASE], "only generation counts"
        other.text(BASE, "x", 1)

        # A lifted limit counts at once.
        path = f"/admin/v1/tenants/{limited.id}"
        raised = service.admin.patch(path, json={"limits": {"requests_per_minute": None}})
        assert raised.status_code == 200
        limited.text(BASE, "x", 1)


def test_tokens_per_minute(service: Service) -> None:
    with service.tenant(tokens_per_minute=60) as limited:
        limited.text(BASE, "x", 40, extra_body={"ignore_eos": True})
        with pytest.raises(openai.RateLimitError) as refused:
            limited.text(BASE, "x", 40)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError) as never:
            limited.text(BASE, "x", 100)
        assert never.value.code == "request_too_large"
        assert "retry-after" not in never.value.response.headers


def test_a_revoked_key_and_a_deleted_tenant_are_out_at_once(service: Service) -> None:
    with service.tenant() as tenant:
        path = f"/admin/v1/tenants/{tenant.id}/keys"
        made = service.admin.post(path, json={"label": "second"}).json()
        second = tenant.openai.with_options(api_key=made["key"])
        assert [m.id for m in second.models.list()] == [BASE]
        assert service.admin.delete(f"{path}/{made['id']}").status_code == 204
        with pytest.raises(openai.AuthenticationError):
            second.models.list()
        assert tenant.models() == [BASE]
        tenant.publish("mine", "devil")
        id_ = tenant.id
    assert service.stored(f"tenants/{id_}/") == []
    gone = httpx.get(
        f"{service.url}/v1/models",
        headers={"authorization": f"Bearer {tenant.key}"},
        trust_env=False,
    )
    assert gone.status_code == 401
