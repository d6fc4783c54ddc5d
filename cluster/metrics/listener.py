"""A process's own metrics port: never the tenants' one, on loopback unless a token guards it."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from ..errors import SettingsError

# path -> (content type, function that makes the body)
Routes = Mapping[str, tuple[str, Callable[[], str]]]
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer(ThreadingHTTPServer):
    """A listener with its threads; `close()` ends it."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hangs up early is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Stops answering and frees the port."""
        self.shutdown()
        self.server_close()


class _MetricsServerV6(MetricsServer):
    address_family = socket.AF_INET6


def serve_metrics(
    registry: CollectorRegistry,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
) -> tuple[int, MetricsServer]:
    """Serves a registry's metrics at `/metrics` from a daemon thread.

    Args:
        registry: what to show.
        host: address to bind.
        port: 0 takes a free one.
        token: bearer token that readers must send.

    Returns:
        (the port bound, the server).

    Raises:
        SettingsError: the address can be reached from other machines and there is no token, or
            the port can't be bound.
    """
    return serve_routes(
        {"/metrics": (CONTENT_TYPE_LATEST, lambda: generate_latest(registry).decode())},
        host,
        port,
        token,
    )


def serve_routes(
    routes: Routes, host: str, port: int = 0, token: str | None = None
) -> tuple[int, MetricsServer]:
    """Serves read-only texts by path; see `serve_metrics` for the rest."""
    if token is None and not is_loopback(host):
        raise SettingsError(
            f"metrics_host is {host!r}, which other machines can reach: set "
            "LORAPLEX_METRICS_TOKEN so that readers must authenticate, or use 127.0.0.1"
        )

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # a reader that sends nothing must not hold a thread

        def do_GET(self) -> None:
            if token is not None:
                given = self.headers.get("Authorization", "")
                if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                    self._answer(401, TEXT_FORMAT, "send the bearer token\n")
                    return
            route = routes.get(self.path.partition("?")[0])
            if route is None:
                self._answer(404, TEXT_FORMAT, f"only {', '.join(sorted(routes))} here\n")
                return
            content_type, make = route
            try:
                body = make()
            except Exception as error:
                self._answer(500, TEXT_FORMAT, f"{type(error).__name__}: {error}\n")
                return
            self._answer(200, content_type, body)

        def _answer(self, code: int, content_type: str, body: str) -> None:
            data = body.encode()
            self.send_response(code)
            if code == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes come every few seconds; they are not worth a line each."""

    try:
        server = (_MetricsServerV6 if ":" in host else MetricsServer)((host, port), Handler)
    except OSError as error:
        raise SettingsError(
            f"cannot listen for metrics on {host}:{port}: {error.strerror or error}. "
            "Free the port, or choose another with LORAPLEX_METRICS_PORT"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_address[1], server


def is_loopback(host: str) -> bool:
    """True when only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
