"""The REST API as the command line uses it: one call a method, errors as sentences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from .errors import ClusterError

DEFAULT_URL = "http://127.0.0.1:8000"
# Larger files go straight to the object store.
DIRECT_BYTES = 60_000_000
_TIMEOUT = httpx.Timeout(30.0, read=300.0)
_POLL_S = 0.5
_READ_BYTES = 256 << 10

# bytes that were sent so far, bytes in all
Progress = Callable[[int, int], None]


class RequestFailed(ClusterError):
    """The service refused a request or couldn't be reached; `code` is the API's, or None."""

    def __init__(self, message: str, code: str | None = None, status: int | None = None):
        super().__init__(message)
        self.code = code
        self.status = status


class Client:
    """One key at one service. Use as a context manager."""

    def __init__(self, url: str, key: str):
        self.url = url.rstrip("/")
        # Loopback and the cluster's own address need no proxy; one that is set would break them.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=_TIMEOUT,
            trust_env=not _is_local(self.url),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """The answer's JSON, None when it is empty.

        Raises:
            RequestFailed: with the service's own reason.
        """
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.TimeoutException:
            raise RequestFailed(
                f"{self.url} did not answer in time. Is the service busy or stuck? "
                "`loraplex status` tells"
            ) from None
        except httpx.TransportError as error:
            raise RequestFailed(
                f"cannot reach {self.url}: {error}. Start the service with `loraplex up`, or name "
                "another with --url or LORAPLEX_URL"
            ) from None
        if response.is_success:
            return response.json() if response.content else None
        raise _failure(response)

    def pages(self, path: str) -> list[dict[str, Any]]:
        return self.call("GET", path)["data"]

    def upload(
        self, name: str, config: Path, weights: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Uploads a PEFT adapter under a name and waits until it can be used; its version."""
        if weights.stat().st_size > DIRECT_BYTES:
            return self._upload_presigned(name, config, weights, progress)
        with weights.open("rb") as file:
            reader = _Reporting(file, weights.stat().st_size, progress)
            return self.call(
                "POST",
                "/v1/adapters",
                data={"name": name},
                files={
                    "config": (config.name, config.read_bytes()),
                    "weights": (weights.name, reader),
                },
            )

    def _upload_presigned(
        self, name: str, config: Path, weights: Path, progress: Progress | None
    ) -> dict[str, Any]:
        body = {"name": name, "weights_bytes": weights.stat().st_size}
        begun = self.call("POST", "/v1/adapters/uploads", json=body)
        path = f"/v1/adapters/uploads/{begun['upload_id']}"
        for part, file in (("config", config), ("weights", weights)):
            reports = progress if part == "weights" else None
            _put(begun["urls"][part], begun.get("headers", {}), file, reports)
        self.call("POST", f"{path}/complete")
        while True:
            record = self.call("GET", path)
            if record["status"] == "ready":
                return {"name": name, **record["adapter"]}
            if record["status"] in ("refused", "failed"):
                error = record["error"] or {}
                raise RequestFailed(
                    error.get("message", "the upload failed"), error.get("code"), 422
                )
            time.sleep(_POLL_S)


class _Reporting:
    """A file that tells how much of it was read."""

    def __init__(self, file: Any, size: int, progress: Progress | None):
        self._file = file
        self._size = size
        self._progress = progress

    def read(self, n: int = -1) -> bytes:
        data = self._file.read(n)
        if self._progress is not None:
            self._progress(self._file.tell(), self._size)
        return data

    def seek(self, *args: int) -> int:
        return self._file.seek(*args)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


def _put(url: str, headers: dict[str, str], path: Path, progress: Progress | None) -> None:
    size = path.stat().st_size

    def chunks() -> Iterator[bytes]:
        with path.open("rb") as file:
            reader = _Reporting(file, size, progress)
            while data := reader.read(_READ_BYTES):
                yield data

    try:
        response = httpx.put(
            url,
            content=chunks(),
            headers={**headers, "content-length": str(size)},
            timeout=_TIMEOUT,
            trust_env=not _is_local(url),
        )
    except httpx.TransportError as error:
        host = httpx.URL(url).host
        raise RequestFailed(
            f"cannot reach the object store at {host}: {error}. Uploads of more than "
            f"{DIRECT_BYTES // 10**6} MB go there directly"
        ) from None
    if not response.is_success:
        raise RequestFailed(
            f"the object store refused {path.name}: {response.status_code} {response.text[:300]}",
            status=response.status_code,
        )


def _failure(response: httpx.Response) -> RequestFailed:
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        text = response.text.strip()[:300] or response.reason_phrase
        message, code = f"{response.status_code}: {text}", None
    return RequestFailed(message, code, response.status_code)


def _is_local(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """adapter_config.json and adapter_model.safetensors of a PEFT folder.

    Raises:
        RequestFailed: naming the file that is missing.
    """
    if not folder.is_dir():
        raise RequestFailed(
            f"there is no folder {folder}. Give the one that PEFT's save_pretrained wrote"
        )
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise RequestFailed(f"{folder} has no adapter_config.json: it isn't a PEFT adapter")
    if not weights.is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = ": pickled weights (.bin) aren't accepted, save with safe_serialization=True"
        raise RequestFailed(f"{folder} has no adapter_model.safetensors{hint}")
    return config, weights
