"""Hosts of a test: network namespaces on one bridge, each with its own address and host name. Needs root.

    bridge (this host, x.x.x.1) ══ veth ══ host alpha (x.x.x.2)
                                ══ veth ══ host beta  (x.x.x.3) …

A host is cut off by taking down its cable on the bridge's side: connections stay, packets are lost. Names and the
network are drawn at random, so that two test runs do not meet; `close` removes everything.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.running import PYTHON, RunningSupervisor
from tests.support.waiting import wait_until


def why_not() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        with Network():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"no network namespaces here: {told}"


class Network:
    """The bridge. Its own `address` is this host's."""

    def __init__(self) -> None:
        self._mark = f"{random.randrange(16**4):04x}"
        self._net = f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
        self._bridge = f"tb{self._mark}"
        self._hosts: list[Host] = []
        self.address = f"{self._net}.1"

    def __enter__(self) -> Self:
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_host(self, name: str) -> Host:
        host = Host(name, f"{self._net}.{len(self._hosts) + 2}", f"{self._mark}{len(self._hosts)}")
        self._hosts.append(host)
        host.build(self._bridge)
        return host

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)


class Host:
    """One network namespace. What is started in it also has the host's name."""

    def __init__(self, name: str, address: str, mark: str) -> None:
        self.name = name
        self.address = address
        self._namespace = f"test-{name}-{mark}"
        self._cable = f"tv{mark}"

    def build(self, bridge: str) -> None:
        inside = f"ti{self._cable[2:]}"
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", self._namespace)
        _ip("link", "set", self._cable, "master", bridge, "up")
        _ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", inside)
        _ip("-n", self._namespace, "link", "set", inside, "up")
        _ip("-n", self._namespace, "link", "set", "lo", "up")

    def command(self, program: list[str]) -> list[str]:
        """How a program is started on this host; it takes the place of its starter."""
        in_network = ["ip", "netns", "exec", self._namespace]
        with_name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return [*in_network, *with_name, *program]

    def cut_off(self) -> None:
        _ip("link", "set", self._cable, "down")

    def reconnect(self) -> None:
        _ip("link", "set", self._cable, "up")

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        self.cut_off()
        try:
            yield
        finally:
            self.reconnect()

    def close(self) -> None:
        for arguments in (("link", "del", self._cable), ("netns", "del", self._namespace)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*arguments)


class HostSupervisor(RunningSupervisor):
    """A supervisor on one of these hosts."""

    def __init__(self, host: Host, directory: Path, mongo_uri: str, db_name: str, **settings: object) -> None:
        super().__init__(directory, mongo_uri, db_name, metrics_host=host.address, **settings)
        self.host = host
        self.log_path = directory / f"{host.name}.log"

    def start(self, *, ready: bool = True, timeout: float = 60) -> RunningSupervisor:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.host.command([PYTHON, "-m", "supervisor"]),
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if ready:
            wait_until(self.is_ready, timeout=timeout, what=lambda: f"a ready {self.host.name}:\n{self.log()[-3000:]}")
        return self


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
