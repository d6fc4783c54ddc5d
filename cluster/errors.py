"""Errors of the cluster folder."""

from __future__ import annotations

from collections.abc import Mapping


class ClusterError(Exception):
    """Base of all errors that this folder raises on purpose; the message is for the user."""


class SettingsError(ClusterError):
    """A setting is wrong; the message names it, its value and what would be right."""


class ClusterSecretError(ClusterError):
    """The secret that gateways and groups share is missing or unreadable."""


class ActorUnavailable(ClusterError):
    """A named actor of the cluster isn't there, or doesn't answer."""


class ApiError(ClusterError):
    """An answer other than success to an HTTP request, shaped as OpenAI's error object.

    Args:
        status: HTTP status.
        code: stable, for programs ("model_not_found").
        message: for people; says what was wrong and what would be right.
        kind: OpenAI's `type` ("invalid_request_error", "authentication_error", ...).
        param: name of the request field at fault, if one is.
        headers: more response headers (`Retry-After`).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }
