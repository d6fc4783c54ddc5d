"""More adapters than the pools hold."""

from __future__ import annotations

import threading
import time

import pytest

from tests.e2e.service import FOLDERS, Service

pytestmark = [pytest.mark.timeout(400), pytest.mark.cluster]

PROMPT = "In the beginning"


def test_adapters_take_turns_where_not_all_fit(service: Service) -> None:
    loads, evictions = "loraplex_engine_loads_total", "loraplex_engine_evictions_total"
    before = {name: sum(service.metric(name).values()) for name in (loads, evictions)}
    texts = {name: service.owners[name].text(name, PROMPT) for name in FOLDERS}
    for _ in range(3):
        for name, tenant in service.owners.items():
            assert tenant.text(name, PROMPT) == texts[name]

    # All at once: more are wanted in one moment than fit.
    wrong: list[object] = []

    def ask(name: str) -> None:
        try:
            text = service.owners[name].text(name, PROMPT)
            if text != texts[name]:
                wrong.append((name, text))
        except Exception as error:
            wrong.append((name, error))

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*FOLDERS] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    deadline = time.monotonic() + 10
    while True:
        after = {name: sum(service.metric(name).values()) for name in (loads, evictions)}
        if all(after[name] > before[name] for name in after):
            break
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.2)
    size, used = (
        service.metric("loraplex_engine_pool_bytes"),
        service.metric("loraplex_engine_pool_used_bytes"),
    )
    assert set(size) == set(used)
    assert all(0 < used[group] <= size[group] for group in size)
