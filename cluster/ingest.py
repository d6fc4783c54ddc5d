"""The ingest actor: uploads are checked, packed and published here, never in a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any

from ..adapter_store import (
    AdapterRefused,
    AdapterStoreError,
    BaseModel,
    Catalogue,
    LimitExceeded,
    ObjectStore,
    Publisher,
    UploadSizes,
    sweep,
)
from .adapter_json import version_json
from .errors import ActorUnavailable
from .logs import configure_logs
from .metrics import IngestMetrics, Target, new_registry, serve_metrics
from .named_actors import CONTROLLER_NAME, INGEST_NAME, NamedActor, start_named
from .replica_address import advertised
from .settings import Settings
from .uploads import Uploads

logger = logging.getLogger(__name__)

INGEST_CPUS = 0.1
_SWEEP_EVERY_S = 3600.0
_REGISTER_EVERY_S = 5.0

# A version's fields, or the error that a publish ended with.
Result = dict[str, Any] | AdapterStoreError


class IngestWorker:
    """Publishes staged uploads. Several threads call it at once.

    Args:
        settings: where the store is.
        base_model: `BaseModel.to_json` of the served model.
    """

    def __init__(self, settings: Settings, base_model: str) -> None:
        store = ObjectStore(**settings.store_options())
        self._uploads = make_uploads(settings, store)
        self._publisher = Publisher(
            store,
            Catalogue(store),
            BaseModel.from_json(base_model),
            settings.scratch_dir,
            upload_sizes(settings),
            settings.max_lora_rank,
        )
        self.registry = new_registry()
        self._metrics = IngestMetrics(self.registry)
        threading.Thread(
            target=sweep_forever,
            args=(store, settings.presigned_expires_s),
            name="sweep",
            daemon=True,
        ).start()

    def ingest(self, tenant_id: str, name: str, upload_id: str) -> Result:
        """The published version's fields, or why there is none.

        Errors are values: one that is raised would reach the caller inside of Ray's own.
        """
        started = time.monotonic()
        end = "failed"
        try:
            version = version_json(self._publisher.ingest(tenant_id, name, upload_id))
            end = "published"
            return version
        except AdapterStoreError as error:
            end = "refused" if isinstance(error, AdapterRefused | LimitExceeded) else end
            return error
        finally:
            self._metrics.ended(end, time.monotonic() - started)

    def ingest_upload(self, tenant_id: str, name: str, upload_id: str) -> None:
        """The same for a presigned upload; its record says how it ended."""
        try:
            result = self.ingest(tenant_id, name, upload_id)
        except Exception:
            logger.exception("upload %s of tenant %s failed", upload_id, tenant_id)
            result = AdapterStoreError("the ingest failed; its log says why")
        finish_upload(self._uploads, tenant_id, name, upload_id, result)


def sweep_forever(store: ObjectStore, urls_live_s: float) -> None:
    """Removes what crashes and abandoned uploads left behind, every hour.

    Args:
        urls_live_s: of uploads.
    """
    while True:
        time.sleep(_SWEEP_EVERY_S)
        try:
            report = sweep(store, Catalogue(store), urls_live_s=urls_live_s)
            logger.info("swept the store: %s", report)
        except Exception as error:  # or nothing would ever be swept again
            logger.warning("the store wasn't swept, the next try is in an hour: %r", error)


class IngestActor(IngestWorker):
    """The worker with its metrics port."""

    def __init__(self, settings: Settings, base_model: str) -> None:
        configure_logs(settings.logs, "ingest")
        super().__init__(settings, base_model)
        token = settings.metrics_token
        port, _ = serve_metrics(
            self.registry, settings.metrics_host, token=token.get_secret_value() if token else None
        )
        target = Target(
            "ingest", advertised(settings.internal_host), port, {"replica": INGEST_NAME}
        )
        threading.Thread(
            target=register_forever, args=(target,), name="register", daemon=True
        ).start()


def register_forever(target: Target) -> None:
    """Tells the controller of this actor's exporter, again and again: it may be restarted."""
    controller = NamedActor(CONTROLLER_NAME)
    fields = (target.kind, dict(target.labels), target.host, target.port)

    async def run() -> None:
        while True:
            with contextlib.suppress(ActorUnavailable):
                await controller.call("register_target", *fields)
            await asyncio.sleep(_REGISTER_EVERY_S)

    asyncio.run(run())


def finish_upload(
    uploads: Uploads, tenant_id: str, name: str, upload_id: str, result: Result
) -> None:
    """Writes an ingest's result into the upload's record."""
    if isinstance(result, AdapterRefused):
        error = {"code": result.code, "message": result.message, "key": result.key}
        uploads.finish(tenant_id, upload_id, "refused", error=error)
    elif isinstance(result, AdapterStoreError):
        code = "limit_exceeded" if isinstance(result, LimitExceeded) else "ingest_failed"
        error = {"code": code, "message": str(result), "key": None}
        uploads.finish(tenant_id, upload_id, "failed", error=error)
    else:
        uploads.finish(tenant_id, upload_id, "ready", adapter={"name": name, **result})


def upload_sizes(settings: Settings) -> UploadSizes:
    return UploadSizes(weights=max(settings.presigned_max_bytes, settings.upload_max_bytes))


def make_uploads(settings: Settings, store: ObjectStore) -> Uploads:
    """Upload records of a store, with URLs that clients outside can use."""
    signer = store
    if settings.store_public_endpoint is not None:
        signer = ObjectStore(
            **{**settings.store_options(), "endpoint": settings.store_public_endpoint}
        )
    return Uploads(store, signer, upload_sizes(settings), settings.presigned_expires_s)


def start_ingest(settings: Settings, base_model: BaseModel) -> Any:
    """The cluster's ingest actor, started if there is none."""
    return start_named(
        INGEST_NAME,
        IngestActor,
        settings,
        base_model.to_json(),
        num_cpus=INGEST_CPUS,
        resources=settings.control_resources,
        max_concurrency=settings.ingest_concurrency,
    )
