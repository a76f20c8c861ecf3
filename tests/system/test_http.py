"""The HTTP server: what it answers, and that no client can keep the others from an answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from supervisor import events
from supervisor.errors import ConfigurationError
from supervisor.metrics import Metrics
from supervisor.web.server import Health, Readiness, WebServer, listen
from tests.support.waiting import wait_until


class Site:
    """A server whose verdicts a test sets."""

    def __init__(self, **options: float) -> None:
        self.health: Callable[[], Health] = lambda: Health(True)
        self.ready: Callable[[], Readiness] = lambda: Readiness(True)
        self.metrics = Metrics(version="1.0")
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self.server = WebServer(
            sock,
            self.metrics.registry,
            lambda: self.health(),
            lambda: self.ready(),
            **options,  # type: ignore[arg-type]
        )

    def request(self, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response, response.read()

    def raw(self, data: bytes) -> bytes:
        with self.connect() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return client.makefile("rb").read()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def running_site(**options: float) -> Iterator[Site]:
    site = Site(**options)
    site.server.start()
    try:
        yield site
    finally:
        site.server.stop()
    wait_until(lambda: not serving_threads(), timeout=10, what="all threads of the server to end")


def serving_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "web" or "process_request" in one.name]


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as site:
        yield site


def test_metrics_in_both_formats(site: Site) -> None:
    response, body = site.request("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in parse_text(body.decode())}
    assert {"supervisor_jobs_finished", "process_open_fds"} <= names
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response, body = site.request("/metrics", Accept=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert {family.name for family in parse_openmetrics(body.decode())} == names


def test_healthy_or_not(site: Site) -> None:
    response, body = site.request("/healthz")
    assert (response.status, json.loads(body)) == (200, {"healthy": True, "reasons": []})
    site.health = lambda: Health(False, ["the main loop has been silent for 12 s"])
    response, body = site.request("/healthz")
    assert response.status == 503
    assert json.loads(body)["reasons"] == ["the main loop has been silent for 12 s"]


def test_ready_or_why_not(site: Site) -> None:
    response, body = site.request("/readyz")
    assert (response.status, json.loads(body)["ready"]) == (200, True)
    site.ready = lambda: Readiness(False, ("MongoDB cannot be reached",))
    response, body = site.request("/readyz?verbose")
    assert response.status == 503
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"ready": False, "reasons": ["MongoDB cannot be reached"]}


def test_the_index_leads_on_and_the_rest_is_not_found(site: Site) -> None:
    response, body = site.request("/")
    assert response.status == 200
    assert all(path in body for path in (b"/metrics", b"/healthz", b"/readyz"))
    for path in ("/nothing", "/metrics/", "/../etc/passwd", "/%6detrics"):
        assert site.request(path)[0].status == 404


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/nothing"])
def test_head_is_get_without_the_body(site: Site, path: str) -> None:
    got, _ = site.request(path)
    head, body = site.request(path, "HEAD")
    assert (head.status, body) == (got.status, b"")
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_everything_else_is_not_allowed(site: Site, method: str) -> None:
    response, body = site.request("/metrics", method)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"
    assert b"supervisor_" not in body


def test_the_server_does_not_tell_what_it_is_made_of(site: Site) -> None:
    assert "Python" not in site.request("/")[0].headers["Server"]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET /metrics\r\n", b"G" * 70_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500,
        b"GET / HTTP/1.1\r\n" + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\xff\xfe / HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_gets_no_traceback(site: Site, capfd: pytest.CaptureFixture[str], data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it may hang up before all is sent
        assert b"Traceback" not in site.raw(data)
    assert site.request("/healthz")[0].status == 200
    assert capfd.readouterr().err == ""


def test_a_failing_page_is_an_answer_and_an_event(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> Health:
        raise RuntimeError("the secret inside")

    site.health = fail
    events.configure_logging("json", "info")
    response, body = site.request("/healthz")
    assert response.status == 500
    assert body == b"500 Internal Server Error\n"
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "page_failed"
    assert json.loads(line)["error"] == "RuntimeError: the secret inside"


def test_many_silent_clients_block_nobody() -> None:
    with running_site(max_connections=8) as site, contextlib.ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(site.connect()).sendall(b"GET /metrics HT")
        started = time.monotonic()
        assert site.request("/healthz")[0].status == 200
        assert time.monotonic() - started < 5
        wait_until(lambda: len(serving_threads()) <= 9, timeout=10, what="few threads")


def test_a_trickling_client_is_cut_off() -> None:
    with running_site(connection_seconds=0.5) as site, site.connect() as client:
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                client.sendall(b"a")
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if client.recv(100) == b"":
                        break
        assert time.monotonic() < deadline


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with running_site(connection_seconds=0.5) as site:
        Gauge("big", "x" * 20_000_000, registry=site.metrics.registry)  # fills the buffers of a connection
        with site.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            wait_until(lambda: len(serving_threads()) == 1, timeout=20, what="its thread to end")


def test_clients_that_vanish_leave_no_trace(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(50):
        with site.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert site.request("/healthz")[0].status == 200
    wait_until(lambda: len(serving_threads()) == 1, timeout=10, what="their threads to end")
    assert capfd.readouterr().err == ""


def test_parallel_scrapes(site: Site) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(site.request("/metrics")[0].status)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 16


def test_stopping_is_final_and_may_be_repeated() -> None:
    site = Site()
    site.server.stop()  # before the start
    site = Site()
    site.server.start()
    with site.connect() as client:
        site.server.stop()
        site.server.stop()
        with contextlib.suppress(ConnectionError):
            assert client.recv(100) == b""
    with pytest.raises(ConnectionError):
        site.connect()


_SERVE = """
import socket, sys, time
from supervisor.metrics import Metrics
from supervisor.web.server import *
sock = socket.socket(fileno=int(sys.argv[1]))
WebServer(sock, Metrics().registry, lambda: Health(True), lambda: Readiness(True)).start()
time.sleep(60)
"""


def test_a_successor_serves_the_socket_of_a_killed_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        for _ in range(2):
            descriptor = str(sock.fileno())
            server = subprocess.Popen([sys.executable, "-c", _SERVE, descriptor], pass_fds=[sock.fileno()])
            try:
                with contextlib.closing(http.client.HTTPConnection(*sock.getsockname(), timeout=20)) as client:
                    client.request("GET", "/healthz")  # waits in the queue of the socket until somebody serves
                    assert client.getresponse().status == 200
            finally:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_listening() -> None:
    assert listen("127.0.0.1", 0) is None
    with contextlib.closing(listen("localhost", free_port())) as sock:  # type: ignore[type-var]
        assert sock is not None
        assert not sock.get_inheritable()


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_listening_on_ipv6(host: str) -> None:
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this host has no IPv6")
    port = free_port()
    with contextlib.closing(listen(host, port)):  # type: ignore[type-var]
        socket.create_connection(("127.0.0.1" if host == "::" else "::1", port), timeout=10).close()


def test_a_taken_port_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1 is taken") as raised:
            listen("127.0.0.1", port)
    assert raised.value.setting == "METRICS_PORT"
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "a..b", "999.1.1.1", "x" * 300, "host.invalid"])
def test_a_bad_address_names_the_setting(host: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        listen(host, free_port())
    assert raised.value.setting == "METRICS_HOST"


def test_a_registry_of_its_own() -> None:
    assert Metrics().registry is not Metrics().registry
    mine = CollectorRegistry()
    assert Metrics(mine).registry is mine
