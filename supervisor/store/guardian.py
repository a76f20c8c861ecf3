"""The guardian of the embedded MongoDB: runs one mongod for as long as anybody uses it.

It is executed as a file by `supervisor.store.embedded`, with the standard library only, in a session of its
own. All that it knows about the users is a lock: each holds `users.lock` shared, and the guardian waits for
it exclusively. Getting it means that nobody is left, however they ended; it then stops mongod and keeps the
lock until mongod is gone, so that a newcomer waits. `guardian.lock` is held by the guardian and by mongod:
who can take it knows that neither lives.

When mongod dies, the guardian starts it again. When the guardian dies, the kernel kills mongod (on Linux),
and the next user, or one that looks after it (`EmbeddedMongo.revive`), starts both. SIGTERM, SIGINT and
SIGHUP do nothing here: a service manager sends them to all processes of a service at once, and jobs that
are handed back then need a database.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USERS_LOCK = "users.lock"
GUARDIAN_LOCK = "guardian.lock"  # its content is the guardian's process id
GUARDIAN_LOG = "guardian.log"
MONGOD_LOG = "mongod.log"
READY = "ready"  # exists while mongod is primary; its content is the path of the socket
SOCKET = "mongod.sock"

REPLICA_SET = "rs0"
# Relative to mongod's working directory, so that the member's name stays true when the data moves.
MEMBER = f"./{SOCKET}"

STOP_SECONDS = 20.0  # from SIGTERM to SIGKILL
STEADY_SECONDS = 60.0  # a mongod that ran this long is restarted without a longer delay than at first
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.1, 10.0
LOOK_SECONDS = 1.0
LOG_LIMIT_BYTES = 16 * 2**20
OPEN_FILES = 64_000
OPLOG_MB = 512

_PR_SET_PDEATHSIG = 1
_ALREADY_INITIALIZED = 23
_NOT_A_MEMBER = 93


class MongodEnded(Exception):
    """mongod has ended, and nobody asked it to."""


class Guardian:
    """Runs `program` on `directory`/data, listening on a socket in `socket_directory`."""

    def __init__(self, program: Path, directory: Path, socket_directory: Path, guardian_lock: int) -> None:
        self._program = program
        self._directory = directory
        self._socket_directory = socket_directory
        self._guardian_lock = guardian_lock
        self._users_lock = os.open(directory / USERS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._log = directory / MONGOD_LOG
        self._ready = directory / READY
        self._socket = socket_directory / SOCKET

    def run(self) -> int:
        """Serve until nobody uses mongod. Returns the exit code: 1 if it could not be started at all."""
        delay = FIRST_DELAY_SECONDS
        served_before = False
        while True:
            started, log_size = time.monotonic(), self._log_size()
            mongod = self._start_mongod()
            try:
                if self._until_primary(mongod):
                    served_before = True
                    self._publish()
                    self._until_unused(mongod)
                self._ready.unlink(missing_ok=True)
                _stop(mongod)
                return 0
            except MongodEnded:
                self._ready.unlink(missing_ok=True)
                self._say(f"mongod ended with status {mongod.returncode}: {self._last_words(log_size)}")
            if not served_before or self._deleted():
                return 1
            if time.monotonic() - started > STEADY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            if self._unused_within(delay):
                return 0
            delay = min(delay * 2, LONGEST_DELAY_SECONDS)

    def _start_mongod(self) -> subprocess.Popen[bytes]:
        self._ready.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)
        if self._log_size() > LOG_LIMIT_BYTES:
            self._put_log_aside()
        arguments = [
            str(self._program), "--replSet", REPLICA_SET, "--dbpath", str(self._directory / "data"),
            "--bind_ip", MEMBER, "--nounixsocket", "--filePermissions", "0700",  # and nothing else
            "--logpath", str(self._log), "--logappend", "--logRotate", "reopen", "--quiet",
            "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", str(OPLOG_MB),
            "--setParameter", "diagnosticDataCollectionEnabled=false",
        ]  # fmt: skip
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        guardian = os.getpid()

        def die_with_guardian() -> None:
            if prctl is not None and (prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != guardian):
                os._exit(1)

        return subprocess.Popen(
            arguments,
            cwd=self._socket_directory,
            stdin=subprocess.DEVNULL,
            pass_fds=[self._guardian_lock],
            preexec_fn=die_with_guardian,
        )

    # -- waiting

    def _until_primary(self, mongod: subprocess.Popen[bytes]) -> bool:
        """Wait until mongod accepts writes, as a replica set of one; False if nobody waits for it."""
        while mongod.poll() is None:
            with contextlib.suppress(OSError):
                if self._is_primary():
                    return True
            if self._unused_within(0.01):
                return False
        raise MongodEnded

    def _is_primary(self) -> bool:
        with connection(self._socket) as server:
            state = command(server, {"hello": 1})
            if "setName" in state:
                return bool(state.get("isWritablePrimary"))
            config: _Document = {"_id": REPLICA_SET, "version": 1, "members": [{"_id": 0, "host": MEMBER}]}
            answer = command(server, {"replSetInitiate": config})
            if answer.get("code") == _ALREADY_INITIALIZED:  # it is reading its configuration, or has another
                status = command(server, {"replSetGetStatus": 1})
                if status.get("code") == _NOT_A_MEMBER:  # data that was made under another name of the member
                    command(server, {"replSetReconfig": config, "force": True})
            return False

    def _until_unused(self, mongod: subprocess.Popen[bytes]) -> None:
        """Wait for the exclusive lock; MongodEnded if mongod ends before."""

        def look(*_: object) -> None:
            if mongod.poll() is not None:
                raise MongodEnded
            if self._deleted():
                mongod.kill()
            elif self._log_size() > LOG_LIMIT_BYTES:
                self._put_log_aside()
                mongod.send_signal(signal.SIGUSR1)

        signal.signal(signal.SIGALRM, look)
        try:
            # Also catches what a SIGCHLD handler alone would miss: a death just before the wait.
            signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
            signal.signal(signal.SIGCHLD, look)
            fcntl.flock(self._users_lock, fcntl.LOCK_EX)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _unused_within(self, seconds: float) -> bool:
        """Whether the exclusive lock can be taken, now or after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, 0.1))

    # -- files

    def _deleted(self) -> bool:
        """Whether the directory is gone: there is nothing left to save, and newcomers use another lock."""
        return os.fstat(self._users_lock).st_nlink == 0

    def _publish(self) -> None:
        draft = self._ready.with_suffix(".new")
        draft.write_bytes(os.fsencode(self._socket))
        draft.replace(self._ready)

    def _log_size(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _put_log_aside(self) -> None:
        self._log.replace(self._log.with_suffix(".log.1"))

    def _last_words(self, log_size: int) -> str:
        return last_error(self._log, log_size) or last_line(self._directory / GUARDIAN_LOG) or "no message"

    def _say(self, text: str) -> None:
        print(text, flush=True)


def _stop(mongod: subprocess.Popen[bytes]) -> None:
    mongod.terminate()
    try:
        mongod.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        mongod.kill()
        mongod.wait()


# -- what the logs say


def last_error(log: Path, offset: int = 0) -> str:
    """The last error in a log of mongod after byte `offset`, as one line; empty if there is none."""
    message = ""
    for line in _tail(log, offset):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("s") in ("E", "F"):
            detail = entry.get("attr", {}).get("error")
            if detail or not message:
                message = f"{entry.get('msg', '')}: {detail}" if detail else str(entry.get("msg", ""))
    return " ".join(message.split())[:500]


def last_line(log: Path) -> str:
    """The last line of text in the guardian's log, to which mongod adds lines of JSON; empty if none."""
    lines = (line.strip() for line in reversed(_tail(log)))
    return next((line[:500] for line in lines if line and not line.startswith("{")), "")


def _tail(log: Path, offset: int = 0, limit: int = 256 * 1024) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(offset, os.fstat(file.fileno()).st_size - limit))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


# -- the few words of MongoDB's protocol (OP_MSG and BSON) that a start takes, for a process without pymongo

_OP_MSG = 2013
_Value = int | str | bool | dict[str, Any] | list[Any]
_Document = dict[str, _Value]


@contextlib.contextmanager
def connection(path: Path, timeout: float = 5.0) -> Iterator[socket.socket]:
    """A connection to the server at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.settimeout(timeout)
        server.connect(os.fspath(path))
        yield server


def command(server: socket.socket, document: _Document) -> dict[str, object]:
    """Run an admin command. Returns the plain values at the top of the answer."""
    body = struct.pack("<IB", 0, 0) + encode({**document, "$db": "admin"})
    server.sendall(struct.pack("<iiii", 16 + len(body), 1, 0, _OP_MSG) + body)
    (length,) = struct.unpack_from("<i", _receive(server, 16))
    return decode(_receive(server, length - 16)[5:])


def _receive(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = server.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError("the server closed the connection")
        data += chunk
    return data


def encode(document: _Document) -> bytes:
    """A document as BSON."""
    body = b"".join(_element(name, value) for name, value in document.items())
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def _element(name: str, value: _Value) -> bytes:
    key = name.encode() + b"\0"
    if isinstance(value, bool):
        return b"\x08" + key + struct.pack("<?", value)
    if isinstance(value, int):
        return b"\x10" + key + struct.pack("<i", value)
    if isinstance(value, str):
        text = value.encode() + b"\0"
        return b"\x02" + key + struct.pack("<i", len(text)) + text
    if isinstance(value, dict):
        return b"\x03" + key + encode(value)
    return b"\x04" + key + encode({str(index): item for index, item in enumerate(value)})


_FIXED_SIZES = {0x01: 8, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8}


def decode(document: bytes) -> dict[str, object]:
    """The strings, booleans and 32-bit integers at the top of a BSON document."""
    values: dict[str, object] = {}
    position = 4
    while document[position]:
        kind = document[position]
        end = document.index(b"\0", position)
        name, position = document[position + 1 : end].decode(), end + 1
        if kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:  # a length comes first; it counts itself in documents and arrays, not in strings and binaries
            (size,) = struct.unpack_from("<i", document, position)
            size += {0x03: 0, 0x04: 0, 0x02: 4, 0x05: 5}[kind]
        if kind == 0x02:
            values[name] = document[position + 4 : position + size - 1].decode()
        elif kind == 0x08:
            values[name] = document[position] != 0
        elif kind == 0x10:
            (values[name],) = struct.unpack_from("<i", document, position)
        position += size
    return values


def _become_independent() -> None:
    """Keep nothing of the starter: not its child's place, its signal settings, its small limits."""
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # a handler, unlike SIG_IGN, is not passed on to mongod
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o077)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(program: str, directory: str, socket_directory: str, guardian_lock: str) -> int:
    _become_independent()
    lock = int(guardian_lock)
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    try:
        return Guardian(Path(program), Path(directory), Path(socket_directory), lock).run()
    finally:
        if socket_directory != directory:
            with contextlib.suppress(OSError):
                os.rmdir(socket_directory)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
