"""The HTTP server of a supervisor: /metrics for Prometheus, /healthz and /readyz for who restarts or routes.

It runs in threads of the keeper, on a socket that the supervisor bound before it forked: a taken port is
found at the start, and a keeper that dies is followed by one that serves the same socket. Each connection
gets one request, one thread and a few seconds in all; one too many costs the oldest its place. So a client
that is slow, broken or hostile is cut off, and the others don't notice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics_exposition

from supervisor import events
from supervisor.errors import ConfigurationError

CONNECTION_SECONDS = 10.0
"""From accept to the end of the response. A scrape takes milliseconds."""
MAX_CONNECTIONS = 32
BACKLOG = 128
OPENMETRICS = "application/openmetrics-text"

log = events.logger("web")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the main loop turns: if not, only a restart helps."""

    healthy: bool
    reasons: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether jobs can be run now, and why not."""

    ready: bool
    reasons: Sequence[str] = ()


def listen(host: str, port: int) -> socket.socket | None:
    """A listening socket, or None for port 0; raises `ConfigurationError` for a taken port or bad address."""
    if port == 0:
        return None
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigurationError(f"{host!r} is not an address of this host", setting="METRICS_HOST") from None
    failure = OSError()
    for family, _, _, _, address in found:
        try:
            return _bound(family, address)
        except OSError as error:
            failure = error
    if failure.errno == errno.EADDRINUSE:
        raise ConfigurationError(f"port {port} of {host} is taken", setting="METRICS_PORT")
    if failure.errno == errno.EACCES:
        raise ConfigurationError(f"port {port} is not allowed to this user", setting="METRICS_PORT")
    raise ConfigurationError(f"cannot listen on {host!r}: {failure.strerror}", setting="METRICS_HOST")


def _bound(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" means IPv4, too
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class WebServer:
    """Serves on a listening socket until it is stopped. `health` and `ready` are called in its threads."""

    def __init__(
        self,
        sock: socket.socket,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        ready: Callable[[], Readiness],
        *,
        connection_seconds: float = CONNECTION_SECONDS,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        def handler(*arguments: Any) -> _Handler:
            return _Handler(*arguments, registry=registry, health=health, ready=ready)

        self._server = _Server(sock, handler, connection_seconds, max_connections)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serves from now on, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Closes this process's end of the socket and cuts off its clients. May be called twice."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        self._server.cut_off_all()


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        sock: socket.socket,
        handler: Callable[..., _Handler],
        connection_seconds: float,
        max_connections: int,
    ) -> None:
        super().__init__(sock.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        sock.setblocking(False)  # another process may serve it too, and be faster to accept
        self._connection_seconds, self._max_connections = connection_seconds, max_connections
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}  # oldest first

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # the connection stays in the queue: do not spin on it
            raise
        with self._lock:
            if len(self._since) >= self._max_connections:
                self._cut_off(next(iter(self._since)))
            self._since[connection] = time.monotonic()
        return connection, address

    def service_actions(self) -> None:
        """Called between requests, and at least twice a second."""
        oldest_allowed = time.monotonic() - self._connection_seconds
        with self._lock:
            for connection in [one for one, since in self._since.items() if since < oldest_allowed]:
                self._cut_off(connection)

    def cut_off_all(self) -> None:
        with self._lock:
            for connection in list(self._since):
                self._cut_off(connection)

    def _cut_off(self, connection: socket.socket) -> None:
        """Ends every wait for this client; its thread then closes the connection."""
        self._since.pop(connection, None)
        with contextlib.suppress(OSError):  # it went by itself
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away is no event
            log.warning("request_failed", error=error)


class _Handler(BaseHTTPRequestHandler):
    server_version = "mongo-job-supervisor"
    sys_version = ""

    def __init__(
        self,
        *arguments: Any,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        ready: Callable[[], Readiness],
    ) -> None:
        self._registry, self._health, self._ready = registry, health, ready
        super().__init__(*arguments)

    def do_GET(self) -> None:
        pages = {
            "/": self._index,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
        }
        page = pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            status, kind, body = page()
        except Exception as error:  # the client learns that it failed, the log learns why
            log.error("page_failed", path=self.path, error=error)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self._reply(status, kind, body)

    do_HEAD = do_GET

    def _metrics(self) -> tuple[HTTPStatus, str, bytes]:
        if OPENMETRICS in self.headers.get("Accept", ""):
            body = openmetrics_exposition.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return HTTPStatus.OK, openmetrics_exposition.CONTENT_TYPE_LATEST, body
        body = exposition.generate_latest(self._registry)
        return HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", body

    def _healthz(self) -> tuple[HTTPStatus, str, bytes]:
        health = self._health()
        return _verdict(health.healthy, {"healthy": health.healthy, "reasons": list(health.reasons)})

    def _readyz(self) -> tuple[HTTPStatus, str, bytes]:
        readiness = self._ready()
        return _verdict(readiness.ready, {"ready": readiness.ready, "reasons": list(readiness.reasons)})

    def _index(self) -> tuple[HTTPStatus, str, bytes]:
        return HTTPStatus.OK, "text/html; charset=utf-8", _INDEX

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A plain sentence instead of the standard library's page, also for what is not HTTP at all."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._reply(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())

    def _reply(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no event."""


def _verdict(good: bool, answer: dict[str, Any]) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps(answer).encode() + b"\n"


_INDEX = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mongo-job-supervisor</title>
<h1>mongo-job-supervisor</h1>
<ul>
<li><a href="/metrics">/metrics</a>: for Prometheus
<li><a href="/healthz">/healthz</a>: whether the main loop turns
<li><a href="/readyz">/readyz</a>: whether it can run jobs now, and why not
</ul>
</html>
"""
