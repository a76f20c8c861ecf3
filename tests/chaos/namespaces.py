"""A host of its own for each supervisor: a network namespace without a way out, and a small disk.

A holder process owns the namespaces and hands sockets made inside them to the test (Unix socket, SCM_RIGHTS). The
loopback interface inside is private: 127.0.0.1:PORT reaches only what the test listens on there, so nothing gets
around its proxy. The disk is a tmpfs in a private mount namespace. Everything vanishes with the last process in it.
Run as a file by itself, this is the holder, or (`enter`) the start of a program inside.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Enclosure:
    """The namespaces of one supervisor. `disk` is the path of its small disk, as seen from inside."""

    def __init__(self, disk: Path, size_mb: int) -> None:
        disk.mkdir(parents=True, exist_ok=True)
        self.disk = disk
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid()), str(disk), str(size_mb)]
        self._holder = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, "hold", *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        answer = self._socket.recv(200).decode()
        if answer != "ready":
            self._holder.wait()
            raise OSError(answer or "the holder of the namespaces died")

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none here, or None."""
        with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
            try:
                Enclosure(Path(directory) / "disk", 1).close()
            except OSError as error:
                return str(error)
        return None

    def listen(self, port: int) -> socket.socket:
        """A listening socket inside."""
        return self._ask(f"listen {port}")

    def connect(self, port: int) -> socket.socket:
        """A connection made inside; raises ConnectionRefusedError."""
        return self._ask(f"connect {port}")

    def command(self, program: list[str]) -> list[str]:
        """How a program is started inside; it dies with this process."""
        return [sys.executable, "-I", "-S", __file__, "enter", str(self._holder.pid), str(os.getpid()), *program]

    @property
    def pid(self) -> int:
        """The holder's."""
        return self._holder.pid

    @property
    def disk_from_outside(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{self.disk}")

    def close(self) -> None:
        self._socket.close()
        self._holder.wait()

    def _ask(self, request: str) -> socket.socket:
        self._socket.send(request.encode())
        answer, descriptors, _, _ = socket.recv_fds(self._socket, 200, 1)
        if not descriptors:
            raise ConnectionRefusedError(answer.decode())
        return socket.socket(fileno=descriptors[0])


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _die_with(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _hold(control: int, parent: int, disk: str, size_mb: int) -> None:
    _die_with(parent)
    requests = socket.socket(fileno=control)
    try:
        _unshare()
        _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount private")
        options = f"size={size_mb}m,mode=0700".encode()
        _check(_libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, options), "mount tmpfs")
        _bring_loopback_up()
    except OSError as error:
        requests.send(str(error).encode())
        return
    requests.send(b"ready")
    while request := requests.recv(200).decode():
        kind, port = request.split()
        with socket.socket() as made:
            try:
                if kind == "listen":
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    made.bind(("127.0.0.1", int(port)))
                    made.listen(128)
                else:
                    made.settimeout(2)
                    made.connect(("127.0.0.1", int(port)))
            except OSError as error:
                requests.send(str(error).encode())
                continue
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made.fileno()]))
            requests.sendmsg([b"here"], [rights])


def _unshare() -> None:
    if os.geteuid() == 0:
        _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare")
        return
    user = os.geteuid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")


def _bring_loopback_up() -> None:
    SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _enter(holder: str, parent: int, program: list[str]) -> None:
    directory = os.getcwd()
    kinds = ["net", "mnt"] if os.geteuid() == 0 else ["user", "net", "mnt"]
    opened = [os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]
    for descriptor in opened:
        _check(_libc.setns(descriptor, 0), "setns")
    os.chdir(directory)
    _die_with(parent)
    os.execv(program[0], program)


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        _hold(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        _enter(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
