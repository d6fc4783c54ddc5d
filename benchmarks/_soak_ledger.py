"""What a client counted, beside what the metrics say, for benchmarks/soak.py."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Key = tuple[str, ...]
Counts = dict[Key, float]

REQUESTS = "loraplex_gateway_requests_total"
UNKNOWN = "unknown"  # a wrong key is refused before there is a route
OF_TENANTS = ("/v1/", UNKNOWN)  # routes that the client alone calls; operators have others


@dataclass
class Ledger:
    """All that a client did and was told.

    Args:
        requests: by (route template, status).
        generations, prompts, outputs: requests and tokens by (tenant, adapter; "base" for none).
        limited: refusals by (tenant, limit).
        uploads: by result, and how many of them passed through the ingest actor.
        first_s: seconds to the first token, by tenant.
    """

    requests: Counter[Key] = field(default_factory=Counter)
    generations: Counter[Key] = field(default_factory=Counter)
    prompts: Counter[Key] = field(default_factory=Counter)
    outputs: Counter[Key] = field(default_factory=Counter)
    limited: Counter[Key] = field(default_factory=Counter)
    uploads: Counter[Key] = field(default_factory=Counter)
    ingested: Counter[Key] = field(default_factory=Counter)
    unknown_keys: int = 0
    first_s: dict[str, list[float]] = field(default_factory=dict)
    gone: set[Key] = field(default_factory=set)  # deleted adapters: their series go with them

    def answered(self, tenant: str, adapter: str, usage: Mapping[str, int]) -> None:
        """A generation came to its end."""
        self.generations[tenant, adapter] += 1
        self.prompts[tenant, adapter] += usage["prompt_tokens"]
        self.outputs[tenant, adapter] += usage["completion_tokens"]

    def shown(self, counts: Counter[Key]) -> Counts:
        """Counts by (tenant, adapter), without those of deleted adapters."""
        return {key: float(n) for key, n in counts.items() if key not in self.gone}


class Scrape:
    """Samples of one exposition text."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append(sample)

    def sums(self, name: str, *labels: str) -> Counts:
        """A metric's values by these labels, added up over all others (replica, group, ...)."""
        found: Counts = {}
        for sample in self._samples.get(name, ()):
            key = tuple(sample.labels[label] for label in labels)
            found[key] = found.get(key, 0.0) + sample.value
        return found

    def total(self, name: str) -> float:
        return self.sums(name).get((), 0.0)


@dataclass(frozen=True)
class Check:
    """One comparison. `client` and `metric` are by label values."""

    name: str
    client: Counts
    metric: Counts

    @property
    def differences(self) -> dict[str, tuple[float, float]]:
        """Label values -> (client, metric), where they aren't equal; 0 is as good as nothing."""
        keys = sorted(self.client.keys() | self.metric.keys())
        pairs = {k: (self.client.get(k, 0.0), self.metric.get(k, 0.0)) for k in keys}
        return {"/".join(k) or "all": pair for k, pair in pairs.items() if pair[0] != pair[1]}


def compare(before: Scrape, after: Scrape, ledger: Ledger) -> list[Check]:
    """Every count that both sides have. `before` was taken when the client had done nothing."""

    def since(name: str, *labels: str) -> Counts:
        start = before.sums(name, *labels)
        return {k: n - start.get(k, 0.0) for k, n in after.sums(name, *labels).items()}

    def of_tenants(counts: Counts) -> Counts:
        return {k: n for k, n in counts.items() if k[0].startswith(OF_TENANTS)}

    g = "loraplex_gateway"
    by_route: Counter[Key] = Counter()
    for (route, _), n in ledger.requests.items():
        by_route[route,] += n
    answered: Counts = {(): float(sum(ledger.generations.values()))}
    firsts: Counts = {(tenant,): float(len(s)) for tenant, s in ledger.first_s.items()}
    pair = ("tenant", "adapter")
    admitted = since("loraplex_engine_admitted_requests_total")
    open_now = (
        f"{g}_in_flight_requests",
        "loraplex_engine_running_requests",
        "loraplex_engine_queued_requests",
    )
    return [
        Check(REQUESTS, dict(ledger.requests), of_tenants(since(REQUESTS, "route", "code"))),
        Check(
            f"{g}_request_seconds_count",
            dict(by_route),
            of_tenants(since(f"{g}_request_seconds_count", "route")),
        ),
        Check(
            f"{g}_generations_total",
            ledger.shown(ledger.generations),
            since(f"{g}_generations_total", *pair),
        ),
        Check(
            f"{g}_input_tokens_total",
            ledger.shown(ledger.prompts),
            since(f"{g}_input_tokens_total", *pair),
        ),
        Check(
            f"{g}_output_tokens_total",
            ledger.shown(ledger.outputs),
            since(f"{g}_output_tokens_total", *pair),
        ),
        Check(
            f"{g}_limits_hit_total",
            dict(ledger.limited),
            since(f"{g}_limits_hit_total", "tenant", "limit"),
        ),
        Check(
            f"{g}_auth_failures_total",
            {("unknown",): ledger.unknown_keys},
            since(f"{g}_auth_failures_total", "reason"),
        ),
        Check(f"{g}_uploads_total", dict(ledger.uploads), since(f"{g}_uploads_total", "result")),
        Check(
            "loraplex_ingest_seconds_count",
            dict(ledger.ingested),
            since("loraplex_ingest_seconds_count", "result"),
        ),
        Check(
            f"{g}_time_to_first_token_seconds_count",
            {(): sum(firsts.values())},
            since(f"{g}_time_to_first_token_seconds_count"),
        ),
        Check(
            f"{g}_tenant_time_to_first_token_seconds_count",
            firsts,
            since(f"{g}_tenant_time_to_first_token_seconds_count", "tenant"),
        ),
        Check(
            f"{g}_inter_token_seconds_count",
            {(): sum(ledger.outputs.values()) - sum(firsts.values())},
            since(f"{g}_inter_token_seconds_count"),
        ),
        Check(f"{g}_routing_decisions_total", answered, since(f"{g}_routing_decisions_total")),
        Check("loraplex_engine_admitted_requests_total", answered, admitted),
        *(Check(name, {}, after.sums(name)) for name in open_now),
    ]


def early(before: Scrape, after: Scrape, seconds: Iterable[float]) -> dict[str, tuple[int, int]]:
    """Where the gateways' times to the first token can't be those that the client took.

    A gateway's clock starts after the client's and ends before it. So of each bucket the
    metrics must have as many as the client, or more.

    Returns:
        Upper bound of a bucket -> (the client's count up to it, the metrics').
    """
    name = "loraplex_gateway_time_to_first_token_seconds_bucket"
    start, ordered = before.sums(name, "le"), sorted(seconds)
    found = {}
    for (bound,), n in after.sums(name, "le").items():
        mine, theirs = bisect_right(ordered, float(bound)), int(n - start.get((bound,), 0.0))
        if mine > theirs:
            found[bound] = (mine, theirs)
    return found
