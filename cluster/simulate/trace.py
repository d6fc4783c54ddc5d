"""What a simulation is fed with: adapters, requests and faults, generated or recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ClusterError


class TraceError(ClusterError):
    """A recorded trace can't be read."""


@dataclass(frozen=True)
class TracedAdapter:
    """`key`: as `AdapterRef.key`, "tenant/digest". `nbytes`: in a group's pool and as a pack."""

    key: str
    nbytes: int
    rank: int = 16

    @property
    def tenant(self) -> str:
        return self.key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request. `prefix` names text that the prompts of one adapter share: its first
    `prefix_tokens` tokens. `adapter` None is the base model."""

    at_s: float
    tenant: str
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Fault:
    """The group dies at `at_s` and is back `down_s` later with an empty pool."""

    at_s: float
    group: int
    down_s: float = 60.0


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    `settings` says where it comes from (generator and seed), for the results.
    """

    adapters: tuple[TracedAdapter, ...]
    requests: tuple[TracedRequest, ...]
    faults: tuple[Fault, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {a.key: a.nbytes for a in self.adapters}


def save_trace(trace: Trace, path: Path) -> None:
    """Writes JSON lines: a header with adapters, faults and settings, then a line a request."""
    header = {
        "adapters": [asdict(a) for a in trace.adapters],
        "faults": [asdict(f) for f in trace.faults],
        "settings": trace.settings,
    }
    lines = [header, *(asdict(r) for r in trace.requests)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_trace(path: Path) -> Trace:
    """Reads what `save_trace` wrote; requests are put in the order of their arrival.

    Raises:
        TraceError: names the file and the line that is wrong.
    """
    number = 1
    try:
        lines = path.read_text().splitlines()
        header = json.loads(lines[0])
        adapters = tuple(TracedAdapter(**a) for a in header["adapters"])
        faults = tuple(Fault(**f) for f in header.get("faults", ()))
        requests = []
        for line in lines[1:]:
            number += 1
            requests.append(TracedRequest(**json.loads(line)))
    except OSError as e:
        raise TraceError(f"trace {path}: {e}") from e
    except (IndexError, KeyError, TypeError, ValueError) as e:
        raise TraceError(
            f"trace {path}, line {number}: {type(e).__name__}: {e}; expected a header with "
            '"adapters" [{"key", "nbytes"}], then a line a request with "at_s", "tenant", '
            '"adapter", "prompt_tokens" and "output_tokens"'
        ) from None
    _check(path, adapters, requests)
    return Trace(adapters, in_order(requests), faults, dict(header.get("settings", {})))


def in_order(requests: Iterable[TracedRequest]) -> tuple[TracedRequest, ...]:
    """Sorted by arrival, then by everything else: two runs see the same order."""
    return tuple(sorted(requests, key=lambda r: (r.at_s, r.adapter or "", r.tenant, r.prefix)))


def _check(path: Path, adapters: tuple[TracedAdapter, ...], requests: list[TracedRequest]) -> None:
    known = {a.key for a in adapters}
    for number, r in enumerate(requests, start=2):
        if r.adapter is not None and r.adapter not in known:
            raise TraceError(f"trace {path}, line {number}: adapter {r.adapter!r} has no size")
        if r.at_s < 0 or r.prompt_tokens < 1 or r.output_tokens < 1:
            raise TraceError(
                f"trace {path}, line {number}: at_s must be at least 0 and both token counts at "
                f"least 1, got {r.at_s}, {r.prompt_tokens} and {r.output_tokens}"
            )
