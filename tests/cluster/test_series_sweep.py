"""Series of what was deleted go at every gateway, and limits are counted wherever they hit."""

from __future__ import annotations

import pytest
from loraplex.adapter_store import StoreUnavailable
from loraplex.cluster.gateway.series_sweep import sweep

from tests.cluster.gateway_fakes import Bench, make_bench
from tests.cluster.gateway_store import MemoryStore


def shown(bench: Bench) -> set[tuple[str, str]]:
    """(tenant, adapter) pairs with series."""
    registry = bench.deps.metrics._generations.collect()
    return {
        (sample.labels["tenant"], sample.labels["adapter"])
        for family in registry
        for sample in family.samples
    }


async def ask(bench: Bench, key: str, model: str) -> None:
    async with bench.client(key) as client:
        body = {"model": model, "prompt": "fox", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_what_another_gateway_deleted_loses_its_series_here_too(monkeypatch):
    store = MemoryStore()
    here, there = make_bench(store), _second(store)
    acme, zeta = here.tenant("acme"), here.tenant("zeta")
    for tenant, name in ((acme, "one"), (acme, "two"), (zeta, "three")):
        here.adapter(tenant, name)
    async with here.app.router.lifespan_context(here.app):
        for tenant, name in ((acme, "one"), (acme, "two"), (zeta, "three")):
            await ask(here, tenant.key, name)
        assert shown(here) == {("acme", "one"), ("acme", "two"), ("zeta", "three")}
        there.catalogue.delete_adapter(acme.id, "one")
        there.catalogue.delete_tenant(zeta.id)
        assert await sweep(here.deps)
        assert shown(here) == {("acme", "two")}
        assert await sweep(here.deps)

        def away(tenant_id: str) -> None:
            raise StoreUnavailable("away")

        monkeypatch.setattr(here.deps.catalogue, "adapters", away)
        assert not await sweep(here.deps)
        assert shown(here) == {("acme", "two")}


def _second(store: MemoryStore) -> Bench:
    """Another gateway on the same store, whose admin key is made already."""
    bench = make_bench(MemoryStore())
    bench.catalogue = type(bench.catalogue)(store)  # type: ignore[arg-type]
    return bench


@pytest.mark.parametrize("limit", ["adapters", "requests"])
async def test_each_limit_that_refuses_is_counted_for_its_tenant(limit):
    bench = make_bench(MemoryStore())
    limits = {"adapters": {"max_adapters": 1}, "requests": {"requests_per_minute": 1}}[limit]
    tenant = bench.tenant("acme", **limits)
    bench.adapter(tenant, "one")
    async with bench.app.router.lifespan_context(bench.app), bench.client(tenant.key) as client:
        if limit == "adapters":
            files = {"config": ("c.json", b"{}"), "weights": ("w.safetensors", b"x")}
            answer = await client.post("/v1/adapters", data={"name": "two"}, files=files)
            assert answer.status_code == 403, answer.text
        else:
            body = {"model": "one", "prompt": "fox", "max_tokens": 1}
            codes = [(await client.post("/v1/completions", json=body)).status_code for _ in "ab"]
            assert codes == [200, 429]
    ((labels, count),) = (
        (s.labels, s.value)
        for family in bench.deps.metrics._limits.collect()
        for s in family.samples
    )
    assert labels["tenant"] == "acme"
    assert limit in labels["limit"]
    assert count == 1
