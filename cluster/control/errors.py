"""Errors of the controller."""

from __future__ import annotations

from ..errors import ClusterError


class ControllerStarting(ClusterError):
    """The controller has no epoch yet; ask again."""


class ControllerSuperseded(ClusterError):
    """A newer controller has taken over; this one gives no more advice."""
