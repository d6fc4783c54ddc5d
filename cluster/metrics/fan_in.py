"""Several processes' metrics as one text, and where Prometheus finds the processes themselves."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

FETCH_TIMEOUT_S = 2.0
_FETCH_THREADS = 8


@dataclass(frozen=True)
class Target:
    """One process's exporter. `labels` (group, rank, replica, ...) stay while the process lives."""

    kind: str  # "gateway", "group" or "controller"
    host: str
    port: int
    labels: Mapping[str, str] = field(default_factory=dict)

    def all_labels(self) -> dict[str, str]:
        return {"kind": self.kind, **self.labels}


def http_sd(targets: Iterable[Target]) -> str:
    """The targets as JSON of Prometheus' HTTP service discovery."""
    return json.dumps(
        [
            {"targets": [_address(t)], "labels": dict(sorted(t.all_labels().items()))}
            for t in sorted(targets, key=lambda t: (t.kind, t.host, t.port))
        ]
    )


def fan_in(
    targets: Iterable[Target],
    token: str | None = None,
    fetch: Callable[[Target, str | None], str] | None = None,
) -> str:
    """Reads all targets' metrics at once and merges them; see `merge`.

    As when Prometheus reads them itself, each target shows as `up`: 0 when it can't be read,
    which costs the others no more than the timeout.

    Args:
        targets: the processes to read.
        token: bearer token of their exporters, if they ask for one.
        fetch: how to read one target, for tests; raises OSError or ValueError when it fails.
    """
    targets = list(targets)
    read = fetch or fetch_text

    def families(target: Target) -> str | None:
        try:
            text = read(target, token)
            merge([({}, text)])  # a text that doesn't parse must not spoil the others
            return text
        except (OSError, ValueError, http.client.HTTPException):
            return None

    with ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fan-in") as pool:
        texts = list(pool.map(families, targets))
    lines = ["# HELP up 1 when a process's metrics could be read, else 0.", "# TYPE up gauge"]
    for target, text in zip(targets, texts, strict=True):
        lines.append(_sample_line("up", target.all_labels(), float(text is not None)))
    parts = [(t.all_labels(), text) for t, text in zip(targets, texts, strict=True) if text]
    return merge([({}, "\n".join(lines) + "\n"), *parts])


def merge(parts: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """Merges exposition texts into one that names each family once.

    Args:
        parts: (labels to add, text). A label that a sample has already keeps its value there,
            as `honor_labels` would have it.

    Raises:
        ValueError: a text is not in Prometheus' text format.
    """
    heads: dict[str, tuple[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for labels, text in parts:
        for family in text_string_to_metric_families(text):
            name = family.name + "_total" if family.type == "counter" else family.name
            heads.setdefault(name, (family.documentation, family.type))
            lines = samples.setdefault(name, [])
            lines.extend(_merged_line(sample, labels) for sample in family.samples)
    out: list[str] = []
    for name, (documentation, kind) in heads.items():
        escaped = documentation.replace("\\", r"\\").replace("\n", r"\n")
        out.append(f"# HELP {name} {escaped}")
        out.append(f"# TYPE {name} {kind if kind != 'unknown' else 'untyped'}")
        out.extend(samples[name])
    return "\n".join(out) + "\n"


def fetch_text(target: Target, token: str | None) -> str:
    """One target's exposition text. Raises OSError, HTTPException or ValueError."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=FETCH_TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{_address(target)}/metrics answered {response.status}")
        return response.read().decode()
    finally:
        connection.close()


def _address(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{host}:{target.port}"


def _merged_line(sample: Sample, labels: Mapping[str, str]) -> str:
    return _sample_line(sample.name, {**labels, **sample.labels}, sample.value)


def _sample_line(name: str, labels: Mapping[str, str], value: float) -> str:
    shown = ",".join(f'{k}="{_escape(v)}"' for k, v in sorted(labels.items()))
    return f"{name}{{{shown}}} {_number(value)}" if shown else f"{name} {_number(value)}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
