"""Real mongod processes for tests: thrown away afterwards, and gone even when the test run is killed.

They are started directly, not through the embedded MongoDB, so that a defect there fails its own tests only.
The kernel kills each mongod with the thread that started it (so start them in the main thread); a janitor,
whose standard input ends with the test run, removes the files. `failCommand` and the like are enabled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from pymongo import MongoClient
from pymongo.errors import AutoReconnect, OperationFailure, ServerSelectionTimeoutError

from supervisor.store.embedded import find_mongod

START_SECONDS = 60.0
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)
_REMOVE_AT_END_OF_INPUT = 'cat; for attempt in 1 2 3 4 5 6 7 8 9; do rm -rf -- "$1" && break; sleep 0.3; done'


class _Scratch:
    """A temporary directory that is removed when it is closed, or when this process ends in any way."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mongod-", dir="/tmp"))
        self._janitor = subprocess.Popen(
            ["sh", "-c", _REMOVE_AT_END_OF_INPUT, "janitor", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._janitor.communicate()


class _Member:
    """One mongod process and its data."""

    def __init__(self, directory: Path, address: list[str]) -> None:
        self._directory = directory
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        if self.running:
            return
        command = [
            str(find_mongod()), "--replSet", "rs0", "--dbpath", "data", "--logpath", "log", "--logappend",
            "--nounixsocket", *self._address, "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64",
            "--setParameter", "enableTestCommands=1",
            "--setParameter", "diagnosticDataCollectionEnabled=false",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def send(self, number: signal.Signals) -> None:
        if self.running:
            assert self._process is not None
            self._process.send_signal(number)

    def end(self, number: signal.Signals) -> None:
        """Send a signal that ends the process, which may be stopped, and wait for its end."""
        self.send(number)
        self.send(signal.SIGCONT)
        if self._process is not None:
            self._process.wait(START_SECONDS)

    def last_words(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-5:])
        return ""


class _Servers:
    """What a single server and a replica set have in common: a scratch directory, and an end."""

    def __init__(self) -> None:
        self._scratch = _Scratch()
        self._members: list[_Member] = []

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Kill every mongod and remove the data."""
        for member in self._members:
            member.end(signal.SIGKILL)
        self._scratch.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class MongoServer(_Servers):
    """A single-node replica set on a Unix socket. Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.socket = self._scratch.path / "m.sock"
        self.uri = f"mongodb://{quote(str(self.socket), safe='')}/?directConnection=true"
        self._member = _Member(self._scratch.path, ["--bind_ip", "./m.sock"])
        self._members = [self._member]

    @property
    def pid(self) -> int:
        return self._member.pid

    def start(self) -> None:
        """Start it, on the data it had, and wait until it is primary. Wakes it if it is paused."""
        self.resume()
        self._member.start()
        _initiate(self.uri, [{"_id": 0, "host": "./m.sock"}], self._members)

    def stop(self) -> None:
        """End it as a service manager would."""
        self._member.end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power failure would."""
        self._member.end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang: connections stay, answers do not come."""
        self._member.send(signal.SIGSTOP)

    def resume(self) -> None:
        self._member.send(signal.SIGCONT)


class TcpServer(_Servers):
    """A single-node replica set on TCP, as others have theirs: with users, with TLS, on an address of the network.

    `tls` are the files of its certificate with key, and of its authority. With `users` it asks everybody to
    authenticate, and `uri` is that of the administrator; `uri_of` is anybody else's.
    """

    ADMIN = ("admin", "the-admin's-pass/word")

    def __init__(
        self, address: str = "127.0.0.1", *, users: bool = False, tls: tuple[Path, Path] | None = None
    ) -> None:
        super().__init__()
        self.address = f"{address}:{_free_ports(1, address)[0]}"
        self._users = users
        self._options = f"&tls=true&tlsCAFile={quote(str(tls[1]), safe='')}" if tls else ""
        host, port = self.address.split(":")
        arguments = ["--bind_ip", host, "--port", port]
        if users:
            key = self._scratch.path / "key"
            key.touch(0o600)
            key.write_text("the members of the set know this")
            arguments += ["--keyFile", "key"]
        if tls:
            arguments += ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(tls[0])]
            arguments += ["--tlsCAFile", str(tls[1]), "--tlsAllowConnectionsWithoutCertificates"]
        self._member = _Member(self._scratch.path, arguments)
        self._members = [self._member]
        self.uri = self.uri_of(*self.ADMIN) if users else self.uri_without_user

    def uri_of(self, user: str, password: str, *, source: str = "admin") -> str:
        """The address for a user, with the password in it."""
        credentials = f"{quote(user, safe='')}:{quote(password, safe='')}"
        return f"mongodb://{credentials}@{self.address}/?directConnection=true&authSource={source}{self._options}"

    @property
    def uri_without_user(self) -> str:
        return f"mongodb://{self.address}/?directConnection=true{self._options}"

    @property
    def pid(self) -> int:
        return self._member.pid

    def start(self) -> None:
        """Start it, on the data it had, and wait until it is primary."""
        self._member.start()
        _initiate(self.uri_without_user, [{"_id": 0, "host": self.address}], self._members)
        if self._users:
            self._make_administrator()

    def pause(self) -> None:
        """Let it hang: connections stay, answers do not come."""
        self._member.send(signal.SIGSTOP)

    def resume(self) -> None:
        self._member.send(signal.SIGCONT)

    def _make_administrator(self) -> None:
        """From this host, and as long as there is no user, everybody may."""
        user, password = self.ADMIN
        with _client(self.uri_without_user) as client, contextlib.suppress(OperationFailure):
            client.admin.command("createUser", user, pwd=password, roles=["root"])


class ReplicaSet(_Servers):
    """Three members on free TCP ports of the loopback interface. Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self._hosts = [f"127.0.0.1:{port}" for port in _free_ports(3)]
        for index, host in enumerate(self._hosts):
            directory = self._scratch.path / str(index)
            directory.mkdir()
            self._members.append(_Member(directory, ["--bind_ip", "127.0.0.1", "--port", host.split(":")[1]]))
        self.uri = f"mongodb://{','.join(self._hosts)}/?replicaSet=rs0"

    def start(self) -> None:
        """Start what does not run, and wait until there is a primary and everybody else follows it."""
        for member in self._members:
            member.start()
        members: list[dict[str, Any]] = [{"_id": index, "host": host} for index, host in enumerate(self._hosts)]
        members[0]["priority"] = 2  # decides the first election at once
        _initiate(_direct(self._hosts[0]), members, self._members, primary=False)
        self._await_all_healthy()

    def step_down(self, seconds: int = 5) -> None:
        """Make the primary resign; it does not stand for election for so many seconds."""
        with _client(_direct(self._hosts[self._primary()])) as client, contextlib.suppress(AutoReconnect):
            client.admin.command("replSetStepDown", seconds, secondaryCatchUpPeriodSecs=min(seconds, 2), force=True)

    def kill_primary(self) -> None:
        """End the primary as a power failure would; the others elect a new one within some seconds."""
        self._members[self._primary()].end(signal.SIGKILL)

    def restart_dead(self) -> None:
        """Start what does not run, and wait until the set is whole again."""
        self.start()

    def _primary(self) -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for index, member in enumerate(self._members):
                if member.running and _hello(_direct(self._hosts[index])).get("isWritablePrimary"):
                    return index
            time.sleep(0.05)
        raise TimeoutError("the replica set has no primary")

    def _await_all_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            states = [_hello(_direct(host)) for host in self._hosts]
            if sum(bool(state.get("isWritablePrimary")) for state in states) == 1 and all(
                state.get("isWritablePrimary") or state.get("secondary") for state in states
            ):
                return
            time.sleep(0.05)
        raise TimeoutError("the replica set is not whole: " + self._members[0].last_words())


def _initiate(uri: str, members: list[dict[str, Any]], processes: list[_Member], *, primary: bool = True) -> None:
    """Make the processes a replica set if they are none yet, and wait until the one at `uri` is in it."""
    config = {
        "_id": "rs0",
        "members": members,
        "settings": {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500},
    }
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        state = _hello(uri)
        if state.get("isWritablePrimary") or ("setName" in state and not primary):
            return
        if state and "setName" not in state:
            with _client(uri) as client, contextlib.suppress(OperationFailure, AutoReconnect):
                client.admin.command("replSetInitiate", config)
        for process in processes:
            if not process.running:
                raise RuntimeError(f"mongod ended: {process.last_words()}")
        time.sleep(0.02)
    raise TimeoutError(f"mongod did not become primary: {processes[0].last_words()}")


def _hello(uri: str) -> dict[str, Any]:
    """The state of a server, or nothing if it does not answer."""
    with _client(uri) as client, contextlib.suppress(ServerSelectionTimeoutError, AutoReconnect):
        answer: dict[str, Any] = client.admin.command("hello")
        return answer
    return {}


def _client(uri: str) -> MongoClient[dict[str, Any]]:
    return MongoClient(uri, serverSelectionTimeoutMS=250, connectTimeoutMS=2000, socketTimeoutMS=10_000)


def _direct(host: str) -> str:
    return f"mongodb://{host}/?directConnection=true"


def _free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
