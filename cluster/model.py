"""The base model that the settings name, on this machine."""

from __future__ import annotations

from ..adapter_store import BaseModel, ModelSource
from .errors import SettingsError
from .settings import Settings


def model_source(settings: Settings) -> ModelSource:
    """Raises SettingsError without a model."""
    if settings.model_path is None:
        raise SettingsError(
            "model_path is not set: name the base model's folder, its s3:// URL, or a repository "
            "of the Hugging Face cache"
        )
    secret = settings.model_secret_key
    store = {
        "endpoint": settings.model_endpoint,
        "access_key": settings.model_access_key,
        "secret_key": secret.get_secret_value() if secret else None,
        "region": settings.store_region,
    }
    return ModelSource(settings.model_path, settings.model_cache_dir, store, settings.model_version)


def base_model(settings: Settings) -> BaseModel:
    """Raises SettingsError without a model, BaseModelError when its folder is wrong."""
    source = model_source(settings)
    return BaseModel.from_folder(
        source.folder(),
        settings.served_model_name or source.base_name,
        dummy_weights=settings.load_format == "dummy",
    )
