"""How many requests this process has sent to object stores, and what came of them."""

from __future__ import annotations

import threading
from typing import Any

_lock = threading.Lock()
_counts: dict[tuple[str, str], int] = {}

_RESULTS = {
    401: "denied",
    403: "denied",
    404: "not_found",
    409: "conflict",
    412: "conflict",
    429: "throttled",
    503: "throttled",
}


def store_requests() -> dict[tuple[str, str], int]:
    """(operation, result) -> requests since the process began, each retry counted.

    Operations are S3's ("GetObject"); results are "ok", "not_found", "conflict", "denied",
    "throttled", "error", and "unreachable" where no answer came.
    """
    with _lock:
        return dict(_counts)


def count_requests(client: Any) -> None:
    """Counts what a boto3 client sends from now on."""
    client.meta.events.register("response-received.s3", _on_response)


def _on_response(event_name: str, response_dict: dict[str, Any] | None = None, **_: object) -> None:
    key = event_name.rpartition(".")[2], _result(response_dict)
    with _lock:
        _counts[key] = _counts.get(key, 0) + 1


def _result(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "unreachable"
    status = answer["status_code"]
    return "ok" if status < 400 else _RESULTS.get(status, "error")
