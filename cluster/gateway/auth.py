"""API keys: whose request this is, and what it may do."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ...adapter_store import StoreUnavailable, TenantNotFound
from ..errors import ApiError
from ..limiter import Rates, TokenBucket
from ..logs import add_log_fields
from .answers import error_response, store_unavailable
from .deps import STORE_THREADS, GatewayDeps
from .freshness import GenerationWatch, Stamp
from .lru import LruCache

UNKNOWN_S = 30.0
CACHE_KEYS = 20_000
CACHE_SOURCES = 10_000

_ADMIN_PREFIXES = ("/admin",)
_TENANT_PREFIXES = ("/v1",)
_REASONS = {  # as metrics name them
    "missing_api_key": "missing",
    "invalid_api_key": "unknown",
    "too_many_invalid_keys": "throttled",
    "admin_key_required": "forbidden",
    "tenant_key_required": "forbidden",
}


@dataclass(frozen=True)
class Caller:
    """Who asks. An admin has no tenant."""

    tenant_id: str
    tenant_name: str
    rates: Rates
    max_adapters: int | None
    weight: float = 1.0  # share of the compute, relative to other tenants'
    admin: bool = False


ADMIN = Caller("", "", Rates(), None, admin=True)


@dataclass(frozen=True)
class _Known:
    caller: Caller
    stamp: Stamp


class Authenticator:
    """Keys to callers, cached by the keys' hashes.

    A revoked key stops working within `catalogue_poll_s`. With the store unreachable, keys that
    were used before go on for `auth_grace_s`, counted from when the store last answered.
    """

    def __init__(
        self,
        deps: GatewayDeps,
        watch: GenerationWatch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deps = deps
        self._watch = watch
        self._clock = clock
        self._known = LruCache[_Known](CACHE_KEYS)
        self._unknown = LruCache[Stamp](CACHE_KEYS)
        self._sources = LruCache[TokenBucket](CACHE_SOURCES)
        # As many as the store's threads: a flood of wrong keys is refused before they are all read.
        self._lookups = asyncio.Semaphore(STORE_THREADS)
        self._looking: dict[str, asyncio.Task[Caller | None]] = {}

    async def authenticate(self, authorization: str | None, source: str) -> Caller:
        """The caller of a request.

        Args:
            authorization: the request's header.
            source: the client's address, for the throttle of wrong keys.

        Raises:
            ApiError: 401 missing_api_key or invalid_api_key, 429 for a source that tries keys,
                503 when the store is needed and can't be reached.
        """
        key = _bearer(authorization)
        digest = hashlib.sha256(key.encode()).hexdigest()
        now = self._clock()
        known = self._known.get(digest)
        if known is not None and self._watch.usable(known.stamp):
            return known.caller
        if known is not None:
            return await self._read_caller(digest, key, source, known)
        self._refuse_unknown(digest, source, now)
        async with self._lookups:
            # What came to light while it waited: its own key, or others' wrong ones.
            found = self._known.get(digest)
            if found is not None and self._watch.usable(found.stamp):
                return found.caller
            self._refuse_unknown(digest, source, self._clock())
            return await self._read_caller(digest, key, source, None)

    async def _read_caller(
        self, digest: str, key: str, source: str, known: _Known | None
    ) -> Caller:
        stamp = self._watch.stamp()
        try:
            caller = await self._look_up(digest, key)
        except StoreUnavailable as error:
            if known is not None and self._watch.in_grace(known.stamp):
                return known.caller
            raise store_unavailable(error) from error
        if caller is None:
            self._known.drop(digest)
            self._unknown.put(digest, stamp)
            now = self._clock()
            self._bucket(source, now).take(1, now)
            raise _invalid_key()
        self._known.put(digest, _Known(caller, stamp))
        return caller

    def _refuse_unknown(self, digest: str, source: str, now: float) -> None:
        asked = self._unknown.get(digest)
        if asked is not None:
            if self._watch.unchanged(asked, UNKNOWN_S):
                raise _invalid_key()
            self._unknown.drop(digest)
        wait_s = self._bucket(source, now).wait(1, now)
        if wait_s > 0:
            raise ApiError(
                429,
                "too_many_invalid_keys",
                "too many invalid API keys came from this address; wait before trying another",
                kind="rate_limit_error",
                headers={"retry-after": str(int(wait_s) + 1)},
            )

    def _bucket(self, source: str, now: float) -> TokenBucket:
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = TokenBucket(self._deps.settings.unknown_keys_per_minute, now)
            self._sources.put(source, bucket)
        return bucket

    async def _look_up(self, digest: str, key: str) -> Caller | None:
        """One read of the store for each key at a time, however many requests wait for it."""
        task = self._looking.get(digest)
        if task is None:
            task = asyncio.create_task(self._deps.in_thread(self._read, key))
            self._looking[digest] = task
            task.add_done_callback(lambda _: self._looking.pop(digest, None))
        return await asyncio.shield(task)

    def _read(self, key: str) -> Caller | None:
        catalogue = self._deps.catalogue
        record = catalogue.find_key(key)
        if record is None:
            return None
        if record.admin:
            return ADMIN
        try:
            tenant = catalogue.get_tenant(record.tenant_id)
        except TenantNotFound:
            return None  # it is being deleted
        limits = tenant.limits
        return Caller(
            tenant_id=tenant.id,
            tenant_name=tenant.name,
            rates=Rates(limits.requests_per_minute, limits.tokens_per_minute),
            max_adapters=limits.max_adapters,
            weight=limits.weight,
        )


class AuthMiddleware:
    """Puts the caller into `request.state.caller`, or answers 401, 403 or 429.

    Paths outside of /v1 and /admin are open.
    """

    def __init__(self, app: ASGIApp, deps: GatewayDeps, authenticator: Authenticator) -> None:
        self._app = app
        self._deps = deps
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (area := _area(scope["path"])) is not None:
            try:
                caller = await self._admit(scope, area)
            except ApiError as error:
                self._deps.metrics.auth_failure(_REASONS.get(error.code, "store"))
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
            add_log_fields(tenant=caller.tenant_name or "admin")
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, area: str) -> Caller:
        authorization = _header(scope, b"authorization")
        client = scope.get("client")
        caller = await self._authenticator.authenticate(
            authorization, client[0] if client else "unknown"
        )
        if area == "admin" and not caller.admin:
            raise ApiError(
                403,
                "admin_key_required",
                "this path needs the admin key; a tenant's key was given",
                kind="permission_error",
            )
        if area == "tenant" and caller.admin:
            raise ApiError(
                403,
                "tenant_key_required",
                "this path needs a tenant's key; the admin key was given",
                kind="permission_error",
            )
        return caller


def _area(path: str) -> str | None:
    for area, prefixes in (("admin", _ADMIN_PREFIXES), ("tenant", _TENANT_PREFIXES)):
        if any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes):
            return area
    return None


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return None


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise ApiError(
            401,
            "missing_api_key",
            "no API key was given; send it as `Authorization: Bearer KEY`",
            kind="authentication_error",
            headers={"www-authenticate": "Bearer"},
        )
    return key


def _invalid_key() -> ApiError:
    return ApiError(
        401,
        "invalid_api_key",
        "this API key is unknown or was revoked",
        kind="authentication_error",
        headers={"www-authenticate": "Bearer"},
    )
