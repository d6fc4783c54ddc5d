"""Serve's applications for a cluster that others run: what a config of `serve deploy` imports.

    loraplex.cluster.serve_builders:gateway   loraplex.cluster.serve_builders:groups

Serve calls each in a task of the cluster. Settings come from `args`, then from the environment and
the file of the node's processes, which are the same on all nodes.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from .errors import SettingsError
from .model import model_source
from .serve_app import gateway_app, groups_app, start_actors
from .settings import Settings
from .store_access import is_embedded


def gateway(args: dict[str, Any]) -> serve.Application:
    """The application of the gateways. Starts the controller, ingest and limiter, too.

    Raises:
        SettingsError: something isn't settled that a cluster can't settle by itself.
    """
    settings = cluster_settings(args)
    start_actors(settings)
    return gateway_app(settings)


def groups(args: dict[str, Any]) -> serve.Application:
    """The application of the worker groups. Raises SettingsError as `gateway` does."""
    return groups_app(cluster_settings(args))


def cluster_settings(args: dict[str, Any]) -> Settings:
    """
    Raises:
        SettingsError: naming every setting that one machine finds out by itself and a cluster
            can't, or that is wrong.
    """
    settings = Settings.load(**args)
    missing = []
    if settings.cluster_secret is None:
        missing.append("cluster_secret: the same random text of 32 characters or more on all nodes")
    if settings.device == "auto":
        missing.append("device: cuda or cpu")
    if settings.model_path is None:
        missing.append("model_path: a folder that all nodes have, or an s3:// URL")
    if is_embedded(settings):
        missing.append("store_url, store_endpoint: an object store that all nodes reach")
    if missing:
        raise SettingsError(
            "a cluster needs these settings, from args, LORAPLEX_<NAME> or LORAPLEX_CONFIG:\n"
            + "\n".join(missing)
        )
    source = model_source(settings)
    return settings.changed(
        model_version=source.pinned(source.folder()),
        served_model_name=settings.served_model_name or source.base_name,
    )
