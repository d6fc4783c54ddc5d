"""Flow control: order is kept, credit is obeyed, held tokens are bounded and accounted for."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.workers.front.streams import Client, StreamTable

actions = st.lists(
    st.tuples(
        st.sampled_from(["add", "step", "grant", "pause", "resume", "abort", "finish", "leave"]),
        st.integers(0, 5),
        st.integers(1, 4),
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(actions, st.integers(1, 30))
def test_order_credit_and_bounds_hold_in_any_history(history, bound):
    table = StreamTable(bound)
    clients = [Client(), Client()]
    made: dict[str, list[int]] = defaultdict(list)  # request id -> tokens of the engine
    got: dict[str, list[int]] = defaultdict(list)
    credit: dict[str, int] = {}
    engine: dict[str, tuple[str, Client]] = {}  # engine id -> request
    serial = 0

    def receive(outputs) -> None:
        for output in outputs:
            request = output["id"]
            assert credit[request] > 0 or not output["tok"]
            credit[request] -= len(output["tok"])
            got[request] += output["tok"]
            assert got[request] == made[request][: len(got[request])]

    def send(ready) -> None:
        for client, outputs in ready.items():
            assert all(o.get("error_code") or not client.paused for o in outputs)
            receive(outputs)

    for action, which, n in history:
        client = clients[which % 2]
        names = sorted(client.streams)
        name = names[which % len(names)] if names else None
        if action == "add":
            request, serial = f"r{serial}", serial + 1
            stream = table.add(client, request, n, f"tenant {n % 3}")
            credit[request], engine[stream.engine_id] = n, (request, client)
        elif action in ("step", "finish"):
            outputs = []
            for i, (engine_id, (request, _)) in enumerate(list(engine.items())):
                tokens = [serial * 100 + i * 10 + j for j in range(n)]
                serial += 1
                made[request] += tokens
                outputs.append({"id": engine_id, "tok": tokens})
                if action == "finish" and i == which:
                    outputs[-1]["finish_reason"] = "stop"
                    del engine[engine_id]
            send(table.route(outputs))
            errors, aborts = table.trim()
            send(errors)
            for engine_id in aborts:
                del engine[engine_id]
        elif action == "grant" and name:
            credit[name] += n
            receive(table.grant(client, name, n))
        elif action == "pause":
            client.paused = True
        elif action == "resume":
            receive(table.resume(client))
        elif action == "abort" and name:
            engine_id = table.abort(client, name)
            assert (engine_id is not None) == (engine_id in engine)
            engine.pop(engine_id or "", None)
        elif action == "leave":
            for engine_id in table.remove(client):
                del engine[engine_id]
        assert table.running == len(engine)
        assert sum(table.running_of(f"tenant {n}") for n in range(3)) == len(engine)
        held = [s for c in clients for s in c.streams.values()]
        assert all(not s.held or s.client.paused or s.credit <= 0 for s in held)
        assert table.held_tokens == sum(s.held_tokens for s in held) <= bound

    # Whoever grants enough gets everything.
    for client in clients:
        receive(table.resume(client))
        for name in list(client.streams):
            credit[name] += 1000
            receive(table.grant(client, name, 1000))
            assert got[name] == made[name]
    assert table.held_tokens == 0


def test_one_id_used_by_two_clients_stays_apart():
    table, one, two = StreamTable(100), Client(), Client()
    first, second = table.add(one, "r", 9, "t"), table.add(two, "r", 9, "t")
    ready = table.route([{"id": second.engine_id, "tok": [2]}, {"id": first.engine_id, "tok": [1]}])
    assert [o["tok"] for o in ready[one]] == [[1]]
    assert [o["tok"] for o in ready[two]] == [[2]]


def test_alternatives_count_as_held_memory():
    table, client = StreamTable(1000), Client()
    stream = table.add(client, "r", 0, "t")
    lp = [5, -1.0, 1, [[i, -2.0] for i in range(20)]]
    table.route([{"id": stream.engine_id, "tok": [5], "lp": [lp]}])
    assert table.held_tokens == 22


def test_many_slow_streams_of_one_tenant_end_nobody_elses():
    table, client = StreamTable(100), Client()
    slow = [table.add(client, f"s{i}", 0, "flood") for i in range(20)]
    other = table.add(client, "other", 0, "other")
    table.route([{"id": other.engine_id, "tok": [*range(12)]}])
    for _ in range(10):
        running = [s for s in slow if s.request_id in client.streams]
        table.route([{"id": s.engine_id, "tok": [1]} for s in running])
        table.trim()
    assert "other" in client.streams
    assert table.held_tokens <= 100
