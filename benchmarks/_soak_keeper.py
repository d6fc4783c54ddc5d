"""A tenant who changes its adapters all the time, for benchmarks/soak.py."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
from _soak_client import Asker, Client, Refused
from _soak_ledger import UNKNOWN

MOVING = "moving"  # streams use it while its versions change
PROMPT, PROMPT_TOKENS = "In the beginning", 8
SEEN_S = 2.0  # catalogue_poll_s is 1: by then every gateway knows of a change
ADAPTERS, ADAPTER = "/v1/adapters", "/v1/adapters/{name}"


def fresh(weights: bytes, number: int) -> bytes:
    """The same bfloat16 weights but for last bits of a few: another digest, the same answers."""
    changed = bytearray(weights)
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    for i in range(number.bit_length()):
        changed[start + 2 * i] ^= number >> i & 1
    return bytes(changed)


class Keeper:
    """Uploads, rolls back, deletes, is refused; and asks each time whether it shows.

    Args:
        client: that sends it all.
        tenant, key: whose adapters they are.
        demo: folders of the demo's adapters by name: what is uploaded.
        styles: what each of them answers to PROMPT.
    """

    def __init__(
        self,
        client: Client,
        tenant: str,
        key: str,
        demo: Mapping[str, Path],
        styles: Mapping[str, str],
    ) -> None:
        self.done: dict[str, int] = {}
        self._client = client
        self._tenant = tenant
        self._key = key
        self._files = {
            name: tuple(
                (folder / file).read_bytes()
                for file in ("adapter_config.json", "adapter_model.safetensors")
            )
            for name, folder in demo.items()
        }
        self._styles = styles
        self._numbers = itertools.count(1)
        self._versions: list[str] = []  # the demo's name of each version of MOVING
        self._extra: dict[str, str] = {}  # name -> the demo's name

    async def publish_moving(self) -> None:
        await self._upload_version()

    async def keep_changing(self, running: Callable[[], bool], every_s: float) -> None:
        """One change after the other; then deletes what streams don't use."""
        steps = (
            self._upload_version,
            self._upload_extra,
            self._roll_back,
            self._refused,
            self._delete_extra,
        )
        for step in itertools.cycle(steps):
            if not running():
                break
            pause = asyncio.create_task(asyncio.sleep(every_s))
            await self._try(step)
            await pause
        while self._extra:
            await self._try(self._delete_extra)

    async def _try(self, step: Callable[[], object]) -> None:
        name = step.__name__.removeprefix("_")
        try:
            await step()  # type: ignore[misc]
            self.done[name] = self.done.get(name, 0) + 1
        except (httpx.HTTPError, Refused, ValueError, KeyError) as error:
            self._client.failed(f"{name}: {type(error).__name__}: {error}")

    async def _upload_version(self) -> None:
        style = list(self._styles)[len(self._versions) % len(self._styles)]
        await self._upload(MOVING, style)
        self._versions.append(style)
        await self._expect(MOVING, style)

    async def _upload_extra(self) -> None:
        number = next(self._numbers)
        name, style = f"extra-{number}", list(self._styles)[number % len(self._styles)]
        self._extra[name] = style
        await self._upload(name, style)
        await self._expect(name, style)

    async def _roll_back(self) -> None:
        version = max(1, len(self._versions) - 1)
        path, body = f"{ADAPTERS}/{MOVING}/rollback", {"version": version}
        route = f"{ADAPTER}/rollback"
        response = await self._client.call("POST", path, self._key, route, json=body)
        _must(response, 200)
        await self._expect(MOVING, self._versions[version - 1])

    async def _delete_extra(self) -> None:
        if not self._extra:
            return
        name = next(iter(self._extra))
        del self._extra[name]
        _must(await self._client.call("DELETE", f"{ADAPTERS}/{name}", self._key, ADAPTER), 204)
        self._client.ledger.gone.add((self._tenant, name))
        await self._expect(name, None)

    async def _refused(self) -> None:
        """What can't be served, and a key that nobody has."""
        config, weights = next(iter(self._files.values()))
        response = await self._send("broken", config, weights[:-1])
        _must(response, 422)
        self._count(response.json()["error"]["code"], "refused")
        wrong = await self._client.call("GET", "/v1/models", f"{self._key}x", UNKNOWN)
        _must(wrong, 401)
        self._client.ledger.unknown_keys += 1

    async def _upload(self, name: str, style: str) -> None:
        config, weights = self._files[style]
        _must(await self._send(name, config, fresh(weights, next(self._numbers))), 201)
        self._count("published", "published")

    async def _send(self, name: str, config: bytes, weights: bytes) -> httpx.Response:
        files = {"config": config, "weights": weights}
        form = {"name": name}
        return await self._client.call("POST", ADAPTERS, self._key, data=form, files=files)

    def _count(self, result: str, ingested: str) -> None:
        self._client.ledger.uploads[result,] += 1
        self._client.ledger.ingested[ingested,] += 1

    async def _expect(self, name: str, style: str | None) -> None:
        """Asks a model; None: it must not be there any more."""
        await asyncio.sleep(SEEN_S)
        asker = Asker(self._tenant, self._key, name, name)
        text = await self._client.text(asker, PROMPT, PROMPT_TOKENS)
        expected = None if style is None else self._styles[style]
        if text != expected:
            raise ValueError(f"{name} answers {text!r} instead of {expected!r}, as {style} does")


def _must(response: httpx.Response, status: int) -> None:
    if response.status_code != status:
        raise ValueError(f"status {response.status_code}, not {status}: {response.text[:200]}")
