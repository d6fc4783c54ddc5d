"""The controller's core on an injected clock, with groups that obey it, and its Ray actor."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapter_store import DocumentError
from loraplex.cluster.control import Controller, ControllerConfig, PlacementConfig, RoutingTable
from loraplex.cluster.control.deleted import deleted_adapters
from loraplex.workers import EngineReport, GroupReport

MB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeGroup:
    """Reports, obeys, and loads by itself when it is sent a request."""

    def __init__(self, name: str, pool: int = 4 * MB, deployment: str = "workers") -> None:
        # As busy as makes an adapter's copies its share of the demand in groups.
        self.engine = EngineReport(pool_bytes_total=pool, running=60, max_running=100)
        self.report = GroupReport(deployment, name, "127.0.0.1", 7000, 7100, False, self.engine)
        self.desired: list[str] = []
        self.loads = 0

    @property
    def name(self) -> str:
        return self.report.group

    def tell(self, controller: Controller) -> dict:
        wire = json.loads(json.dumps(self.report.to_wire()))  # as it would cross a border
        advice = controller.report(wire)
        if advice["epoch"] >= self.report.seen_epoch:
            self.report.seen_epoch = advice["epoch"]
            self.desired = advice["desired"]
            for key in advice["purge"]:
                self.engine.gpu.pop(key, None)
                self.engine.disk.pop(key, None)
            for key in self.desired:
                self.load(key, evict_desired=False)
        return advice

    def load(self, key: str, evict_desired: bool = True) -> None:
        if key in self.engine.gpu:
            return
        while sum(self.engine.gpu.values()) + MB > self.engine.pool_bytes_total:
            idle = [k for k in self.engine.gpu if evict_desired or k not in self.desired]
            if not idle:
                return
            victim = min(idle, key=lambda k: k in self.desired)
            del self.engine.gpu[victim]
            self.engine.evictions += 1
        self.engine.gpu[key] = self.engine.disk[key] = MB
        self.engine.loads["s3"] = self.engine.loads.get("s3", 0) + 1

    def serve(self, key: str, tokens: int) -> None:
        self.load(key)
        self.engine.steps += 1
        self.engine.output_tokens[key] = self.engine.output_tokens.get(key, 0) + tokens


class Cluster:
    """Groups and a controller, driven in steps of half a second."""

    def __init__(self, groups: int = 2, pool: int = 4 * MB, **placement) -> None:
        self.clock = Clock()
        self.config = ControllerConfig(
            demand_tau_s=5.0, placement=replace(PlacementConfig(), **placement)
        )
        self.controller = Controller(self.config, self.clock, epoch=1)
        self.groups = [FakeGroup(f"g{i}", pool) for i in range(groups)]
        self.rng = random.Random(7)
        self.last = RoutingTable()

    def step(self, tokens: dict[str, int] | None = None, times: int = 1) -> RoutingTable:
        """Each step serves `tokens` (adapter -> tokens) where the table says, and ticks."""
        for _ in range(times):
            table = self.table()
            for key, count in (tokens or {}).items():
                alive = {g.name: g for g in self.groups}
                names = [n for n in table.placement.get(key, ()) if n in alive] or list(alive)
                alive[self.rng.choice(names)].serve(key, count)
            for group in self.groups:
                group.tell(self.controller)
            self.clock.now += 0.5
            self.controller.tick()
        return self.table()

    def table(self) -> RoutingTable:
        """The table as a gateway has it, which keeps the last one when there is no newer."""
        wire = self.controller.table((self.last.epoch, self.last.version))
        if wire is not None:
            self.last = RoutingTable.from_wire(wire)
        return self.last

    def holders(self, key: str) -> set[str]:
        return {g.name for g in self.groups if key in g.engine.gpu}

    def restart_controller(self, epoch: int) -> None:
        self.controller = Controller(self.config, self.clock, epoch)


def keys(count: int) -> list[str]:
    return [f"tenant/{i:064x}" for i in range(count)]


def test_groups_enter_the_table_when_they_report_and_leave_it_when_they_go_silent():
    cluster = Cluster(groups=2)
    table = cluster.step()
    assert [g.group for g in table.groups] == ["g0", "g1"]
    assert (table.groups[0].host, table.groups[0].port) == ("127.0.0.1", 7000)
    silent = cluster.groups.pop()
    table = cluster.step(times=5)
    assert [g.group for g in table.groups] == ["g0", "g1"]
    table = cluster.step(times=3)
    assert [g.group for g in table.groups] == ["g0"]
    assert cluster.controller.status()["totals"]["groups_lost"] == 1
    cluster.groups.append(silent)
    assert [g.group for g in cluster.step().groups] == ["g0", "g1"]


def test_a_controller_that_was_held_up_itself_loses_no_group():
    cluster = Cluster(groups=2)
    demand = dict.fromkeys(keys(3), 100)
    before = cluster.step(demand, 20)
    cluster.clock.now += 10.0  # stopped, say; the groups' reports of the time wait to be read
    cluster.controller.tick()
    assert cluster.table() == before
    assert cluster.controller.status()["totals"]["groups_lost"] == 0
    assert cluster.step(demand, 3).groups == before.groups
    # Those that really went meanwhile are found out, also by one that is always late.
    del cluster.groups[1]
    for _ in range(3):
        cluster.clock.now += 4.0
        cluster.step(demand)
    assert [g.group for g in cluster.table().groups] == ["g0"]


def test_a_group_that_drained_before_it_left_is_not_counted_as_lost():
    cluster = Cluster(groups=2)
    cluster.step()
    cluster.groups[1].report.draining = True
    table = cluster.step()
    assert [g.draining for g in table.groups] == [False, True]
    cluster.groups.pop()
    assert len(cluster.step(times=8).groups) == 1
    assert cluster.controller.status()["totals"]["groups_lost"] == 0


def test_a_new_group_gets_requests_once_it_holds_what_it_should_or_after_a_while():
    cluster = Cluster(groups=1)
    demand = dict.fromkeys(keys(3), 100)
    cluster.step(demand, 20)
    standby = lambda: {g.group for g in cluster.table().groups if g.standby}  # noqa: E731
    joining = lambda: {  # noqa: E731
        g["group"] for g in cluster.controller.status()["groups"] if g["joining"]
    }
    assert not standby()  # the first has nobody to wait for
    cluster.groups.append(new := FakeGroup("new"))
    new.load = lambda *a, **k: None  # type: ignore[method-assign]
    cluster.step(demand)
    assert standby() == joining() == {"new"}
    assert new.desired == [] or not set(new.desired) & set(new.engine.gpu)
    cluster.step(demand)
    assert new.desired
    del new.load
    cluster.step(demand, 2)
    assert standby() == joining() == set()
    assert set(new.desired) <= set(new.engine.gpu)


def test_a_new_group_that_cannot_load_gets_requests_after_a_while():
    cluster = Cluster(groups=1)
    demand = dict.fromkeys(keys(3), 100)
    cluster.step(demand, 20)
    cluster.groups.append(slow := FakeGroup("slow"))
    slow.load = lambda *a, **k: None  # type: ignore[method-assign]
    ticks = round(2 * cluster.config.join_s)
    cluster.step(demand, ticks - 2)
    assert [g.group for g in cluster.table().groups if g.standby] == ["slow"]
    cluster.step(demand, 4)
    assert not any(g.standby for g in cluster.table().groups)


def test_a_leaving_group_is_released_when_another_holds_its_adapters():
    cluster = Cluster(groups=3)
    demand = dict.fromkeys(keys(6), 100)
    cluster.step(demand, 30)
    going = next(g for g in cluster.groups if g.engine.gpu)
    alone = set(going.engine.gpu)
    others = [g for g in cluster.groups if g is not going]
    for group in others:
        group.load = lambda *a, **k: None  # type: ignore[method-assign]
        for key in alone:
            group.engine.gpu.pop(key, None)
    going.report.leaving = True
    cluster.step(demand, 3)
    assert not going.tell(cluster.controller)["release"]
    # It serves what no other group holds, and nothing else.
    entries = {g.group: g for g in cluster.table().groups}
    assert entries[going.name].standby
    assert not entries[going.name].draining
    assert all(cluster.table().placement[k] == (going.name,) for k in alone)
    for group in others:
        del group.load
    cluster.step(demand, 4)
    assert going.tell(cluster.controller)["release"]
    assert all(going.name not in names for names in cluster.table().placement.values())
    assert all(cluster.holders(k) - {going.name} for k in alone)


def test_the_last_group_is_released_at_once():
    cluster = Cluster(groups=2)
    cluster.step(dict.fromkeys(keys(3), 10), 20)
    for group in cluster.groups:
        group.report.leaving = True
    cluster.step()
    assert all(g.tell(cluster.controller)["release"] for g in cluster.groups)
    assert all(g.standby for g in cluster.table().groups)


def test_the_version_counts_changes_and_an_unchanged_table_is_not_sent_again():
    cluster = Cluster()
    table = cluster.step(times=5)
    since = (table.epoch, table.version)
    assert cluster.controller.table(since) is None
    cluster.groups[0].engine.queued = 5  # load alone travels on the connections
    cluster.step()
    assert cluster.controller.table(since) is None
    cluster.groups[0].report.draining = True
    cluster.step()
    wire = cluster.controller.table(since)
    assert wire is not None
    assert (wire["epoch"], wire["version"]) == (1, table.version + 1)
    assert cluster.controller.table(list(since)) == wire  # msgpack and JSON make lists


def test_loads_replicas_and_unloads_follow_demand():
    cluster = Cluster(groups=2, pool=4 * MB)
    adapters = keys(12)  # the pools hold eight
    cold, warm = adapters[:8], adapters[8:]
    cluster.step(dict.fromkeys(cold, 30), times=20)
    assert all(cluster.holders(k) for k in cold)
    # Demand moves on: the pools follow, and what nobody asks for goes.
    cluster.step(dict.fromkeys(warm, 30), times=60)
    assert all(cluster.holders(k) for k in warm)
    assert sum(len(g.engine.gpu) for g in cluster.groups) <= 8
    assert sum(g.engine.evictions for g in cluster.groups) >= 4
    # One gets hot: it is copied to the other group, and traffic goes to both.
    hot = warm[0]
    table = cluster.step({hot: 400, warm[1]: 30}, times=30)
    assert cluster.holders(hot) == {"g0", "g1"} == set(table.placement[hot])
    # It cools down again: one copy is enough.
    table = cluster.step(dict.fromkeys(warm, 30), times=60)
    assert len(table.placement[hot]) == 1
    totals = cluster.controller.status()["totals"]
    assert totals["moves_planned"] >= totals["moves_done"] > 0


def test_with_steady_demand_nothing_is_loaded_or_evicted_after_a_while():
    cluster = Cluster(groups=3, pool=4 * MB)
    tokens = {k: 20 + 10 * i for i, k in enumerate(keys(9))}
    cluster.step(tokens, times=40)
    before = [dict(g.engine.loads) for g in cluster.groups]
    version = cluster.table().version
    cluster.step(tokens, times=40)
    assert [g.engine.loads for g in cluster.groups] == before
    assert cluster.table().version == version


def test_the_moves_add_up():
    cluster = Cluster(groups=3, pool=4 * MB)
    rng = random.Random(3)
    for _ in range(60):
        cluster.step({k: rng.randint(0, 300) for k in rng.sample(keys(16), 6)})
        if rng.random() < 0.1 and len(cluster.groups) > 1:
            cluster.groups.pop(rng.randrange(len(cluster.groups)))
        elif rng.random() < 0.1:
            cluster.groups.append(FakeGroup(f"n{rng.getrandbits(30)}", 4 * MB))
    t = cluster.controller.status()["totals"]
    waiting = t["moves_planned"] - t["moves_done"] - t["moves_dropped"]
    assert 0 <= waiting <= sum(len(g.desired) for g in cluster.groups) + 12
    assert t["moved_bytes"] == t["moves_planned"] * MB


def test_before_its_first_plan_a_controller_tells_a_group_to_keep_what_it_has():
    cluster = Cluster(groups=1)
    group = cluster.groups[0]
    group.engine.gpu = dict.fromkeys(keys(3), MB)
    assert group.tell(cluster.controller) == {
        "epoch": 1,
        "desired": keys(3),
        "host": None,
        "purge": [],
        "release": False,
    }


def test_one_group_of_each_node_is_told_what_to_keep_in_memory_and_not_what_is_purged():
    cluster = Cluster(groups=3, host_share=1.0)
    for group, node in zip(cluster.groups, ("n", "n", "m"), strict=True):
        group.report.host, group.engine.host_bytes_total = node, 4 * MB
    wanted = keys(2)
    cluster.step(dict.fromkeys(wanted, 50), times=8)
    told = [group.tell(cluster.controller)["host"] for group in cluster.groups]
    assert told == [wanted, None, wanted]
    cluster.controller.purge(wanted[:1])
    assert cluster.groups[0].tell(cluster.controller)["host"] == wanted[1:]


def test_a_restarted_controller_rebuilds_the_table_and_moves_nothing():
    cluster = Cluster(groups=3)
    tokens = dict.fromkeys(keys(9), 40)
    cluster.step(tokens, times=40)
    before = cluster.table()
    loads = [dict(g.engine.loads) for g in cluster.groups]
    cluster.restart_controller(epoch=2)
    # While it has not heard of all groups, gateways keep the table they have.
    cluster.groups[0].tell(cluster.controller)
    cluster.controller.tick()
    assert cluster.controller.table((before.epoch, before.version)) is None
    after = cluster.step(tokens, times=20)
    assert (after.epoch, before.epoch) == (2, 1)
    assert after.placement == before.placement
    assert [g.engine.loads for g in cluster.groups] == loads
    assert all(g.report.seen_epoch == 2 for g in cluster.groups)


def test_advice_of_an_older_epoch_is_seen_to_be_refused():
    cluster = Cluster(groups=1)
    cluster.step()
    assert cluster.controller.superseded_by is None
    cluster.groups[0].report.seen_epoch = 5
    cluster.step()
    assert cluster.controller.superseded_by == 5
    cluster.controller.adopt_epoch(6)
    assert cluster.controller.superseded_by is None
    assert cluster.step().epoch == 6
    assert cluster.groups[0].report.seen_epoch == 6


def test_a_deleted_adapter_is_purged_everywhere_and_only_once():
    cluster = Cluster(groups=2)
    gone, stays = keys(2)
    cluster.step({gone: 50, stays: 50}, times=10)
    hang = cluster.groups[1]
    for group in cluster.groups:
        group.load(gone)
    cluster.controller.purge([gone])
    assert gone in cluster.groups[0].tell(cluster.controller)["purge"]
    hang.engine.gpu[gone] = MB  # a request still runs on it
    told = 0
    for _ in range(22):
        cluster.clock.now += 0.5
        for group in cluster.groups:
            advice = group.tell(cluster.controller)
            assert gone not in advice["desired"]
            told += gone in advice["purge"]
        hang.engine.gpu[gone] = MB
        cluster.controller.tick()
        assert cluster.controller.status()["purging"] == [gone]
        assert gone not in cluster.table().placement
    assert told == 3  # at once and every 5 s: a group in use of it is not nagged
    hang.engine.gpu.pop(gone, None)
    hang.engine.disk.pop(gone, None)
    cluster.step({stays: 50}, times=2)
    assert cluster.controller.status()["purging"] == []
    # Published and used anew under the same digest: nobody purges it again.
    table = cluster.step({gone: 50, stays: 50}, times=20)
    assert cluster.holders(gone)
    assert table.placement[gone]


def test_a_group_that_comes_up_during_a_purge_is_told_too():
    cluster = Cluster(groups=1)
    (gone,) = keys(1)
    cluster.step({gone: 10})
    cluster.controller.purge([gone])
    cluster.step(times=4)
    late = FakeGroup("late")
    late.engine.disk[gone] = MB  # packs survive on the node's disk
    cluster.groups.append(late)
    cluster.step(times=2)
    assert gone not in late.engine.disk


class Catalogue:
    """Digests of each tenant's kept versions."""

    def __init__(self, **digests: list[str]) -> None:
        self.digests = digests
        self.asked: list[str] = []

    def blobs_in_use(self, tenant_id: str) -> set[tuple[str, str]]:
        self.asked.append(tenant_id)
        if tenant_id == "damaged":
            raise DocumentError("not JSON")
        return {(digest, "blob") for digest in self.digests.get(tenant_id, [])}


def check_adapters(controller: Controller, catalogue: Catalogue) -> list[str]:
    """What the controller's actor does every other second."""
    asked = controller.unchecked()
    deleted = deleted_adapters(catalogue, asked)
    controller.checked(asked, deleted)
    return deleted


def test_a_restarted_controller_purges_what_was_deleted_without_it():
    cluster = Cluster(groups=2)
    gone, stays = keys(2)
    cluster.step({gone: 50, stays: 50}, times=10)
    cluster.groups[0].engine.disk[gone] = MB
    cluster.restart_controller(epoch=2)
    cluster.step({stays: 50}, times=2)
    assert gone in cluster.controller.unchecked()
    catalogue = Catalogue(tenant=[stays.partition("/")[2]])
    assert check_adapters(cluster.controller, catalogue) == [gone]
    assert catalogue.asked == ["tenant"]  # once, however many adapters and groups
    cluster.step({stays: 50}, times=4)
    assert not cluster.holders(gone)
    assert all(gone not in group.engine.disk for group in cluster.groups)
    assert cluster.holders(stays)
    assert cluster.controller.unchecked() == []


def test_groups_that_were_away_are_checked_when_they_come_back_and_others_never_again():
    cluster = Cluster(groups=2)
    gone, stays = keys(2)
    cluster.step({gone: 50, stays: 50}, times=10)
    check_adapters(cluster.controller, Catalogue(tenant=[k.partition("/")[2] for k in keys(2)]))
    away = cluster.groups.pop()
    away.load(gone)
    cluster.step({gone: 50, stays: 50}, times=10)
    assert cluster.controller.unchecked() == []
    cluster.controller.purge([gone])
    cluster.step(times=80)  # the purge ends without the one that is away
    cluster.groups.append(away)
    cluster.step(times=1)
    assert gone in away.engine.gpu
    assert check_adapters(cluster.controller, Catalogue(tenant=[stays.partition("/")[2]])) == [gone]
    cluster.step(times=2)
    assert gone not in away.engine.gpu


def test_adapters_whose_catalogue_cannot_be_read_do_not_count_as_deleted():
    catalogue = Catalogue(acme=["a", "b"])
    held = ["acme/a", "acme/x", "damaged/a", "nobody/a"]
    assert deleted_adapters(catalogue, held) == ["acme/x", "nobody/a"]


def test_a_purge_that_a_group_never_obeys_ends_some_day():
    cluster = Cluster(groups=1)
    (gone,) = keys(1)
    cluster.controller.purge([gone])
    group = cluster.groups[0]
    for _ in range(10):
        group.engine.disk[gone] = MB
        group.tell(cluster.controller)
        cluster.clock.now += 100
        group.tell(cluster.controller)
        cluster.controller.tick()
    assert group.tell(cluster.controller)["purge"] == []


def test_exporters_are_listed_while_they_are_alive():
    cluster = Cluster(groups=1)
    cluster.step()
    cluster.controller.register_target("gateway", {"replica": "r1"}, "127.0.0.1", 7200)
    gateway, group = cluster.controller.metrics_targets()
    assert (gateway.kind, gateway.port, gateway.labels) == ("gateway", 7200, {"replica": "r1"})
    assert (group.kind, group.port) == ("group", 7100)
    assert group.labels == {
        "deployment": "workers",
        "group": "g0",
        "rank": "0",
        "replica": "g0",
    }
    cluster.step(times=40)
    assert [t.kind for t in cluster.controller.metrics_targets()] == ["group"]


def test_status_is_json_and_names_what_an_operator_looks_for():
    cluster = Cluster(groups=2)
    key = keys(1)[0]
    cluster.step({key: 100}, times=10)
    status = json.loads(json.dumps(cluster.controller.status()))
    assert status["epoch"] == 1
    assert [g["group"] for g in status["groups"]] == ["g0", "g1"]
    adapter = status["adapters"][key]
    assert adapter["groups"]
    assert adapter["demand_tokens_per_second"] > 0
    assert any(g["resident"] == {key: MB} for g in status["groups"])


@given(st.lists(st.sampled_from("tskpdjr"), max_size=40), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_no_order_of_events_breaks_it(events, seed):
    """Ticks, steps, kills, purges, drains, joins and restarts, in any order."""
    rng = random.Random(seed)
    cluster = Cluster(groups=2)
    seen = (0, 0)
    for number, event in enumerate(events):
        if event == "t":
            cluster.clock.now += rng.random() * 4
            cluster.controller.tick()
        elif event == "s":
            cluster.step({rng.choice(keys(8)): rng.randint(1, 500)} if cluster.groups else None)
        elif event == "k" and cluster.groups:
            cluster.groups.pop()
        elif event == "p":
            cluster.controller.purge([rng.choice(keys(8))])
        elif event == "d" and cluster.groups:
            rng.choice(cluster.groups).report.draining = True
        elif event == "j":
            cluster.groups.append(FakeGroup(f"n{number}"))
        elif event == "r":
            cluster.restart_controller(cluster.controller.epoch + 1)
        wire = cluster.controller.table(seen)
        if wire is not None:
            table = RoutingTable.from_wire(wire)
            assert (table.epoch, table.version) > seen
            seen = (table.epoch, table.version)
            names = {g.group for g in table.groups if not g.draining}
            assert all(set(placed) <= names for placed in table.placement.values())
        cluster.controller.figures()
        json.dumps(cluster.controller.status())


def test_reports_of_another_shape_are_refused():
    with pytest.raises(TypeError):
        Cluster().controller.report({**FakeGroup("g").report.to_wire(), "surprise": 1})
