"""The base model's files."""

from __future__ import annotations

from collections.abc import Iterator

from ...adapter_store import AdapterStoreError, BaseModel, NotFound, ObjectStore
from .. import up_checks
from ..model import model_source
from ..settings import Settings
from .check import Check


def look_at_model(settings: Settings) -> Iterator[Check]:
    if settings.model_path is None:
        yield Check("model", "skip", "none is named; `loraplex up` brings the demo's")
        return
    if settings.model_path.startswith("s3://"):
        yield _in_s3(settings)
        return
    dummy = settings.load_format == "dummy"
    try:
        source = model_source(settings)
        folder = source.folder()
        up_checks.check_model_folder(folder, weights=not dummy)
        base = BaseModel.from_folder(
            folder, settings.served_model_name or source.base_name, dummy_weights=dummy
        )
    except (up_checks.CheckError, AdapterStoreError) as error:
        yield Check("model", "fail", settings.model_path, str(error))
        return
    detail = (
        f"{base.name} in {folder}: {base.num_layers} layers, {base.num_experts} experts, "
        f"{up_checks.model_bytes(folder) / 1e9:.2f} GB"
    )
    yield Check("model", "ok", detail)


def _in_s3(settings: Settings) -> Check:
    source = model_source(settings)
    try:
        ObjectStore(source.name, **source.store, attempts=2).head("config.json")
    except NotFound:
        advice = "name the prefix below which config.json and the weights lie"
        return Check("model", "fail", f"{source.name} has no config.json", advice)
    except AdapterStoreError as error:
        advice = "check LORAPLEX_MODEL_ENDPOINT, LORAPLEX_MODEL_ACCESS_KEY and _SECRET_KEY"
        return Check("model", "fail", str(error), advice)
    return Check("model", "ok", f"{source.name}: fetched to {source.cache} when a service starts")
