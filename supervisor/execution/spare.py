"""A child that is forked ahead of time, while its runner is idle: the next job starts without waiting for the fork.

It waits on a socket for what it is to run, and becomes the job when that comes. While a job runs there is no spare, so
every descendant of the runner is the job. When the runner dies, the socket closes and the kernel kills the spare.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import dataclass

from supervisor.execution import child
from supervisor.execution.child import Launch
from supervisor.processes import die_with_parent

MAX_LAUNCH_BYTES = 60_000


@dataclass(slots=True)
class Spare:
    """A waiting child, seen from its runner."""

    pid: int
    _socket: socket.socket

    def start(self, launch: Launch, stdout: int, stderr: int) -> bool:
        """Hands the job over; False when the spare cannot take it."""
        data = json.dumps(launch.as_values()).encode()
        if len(data) > MAX_LAUNCH_BYTES:
            return False
        try:
            socket.send_fds(self._socket, [data], [stdout, stderr])
        except OSError:
            return False
        self._socket.close()
        return True

    def dismiss(self) -> None:
        """It ends by itself; its end must be collected."""
        self._socket.close()


@dataclass(frozen=True, slots=True)
class Orders:
    """What a spare has been told to become."""

    launch: Launch
    stdout: int
    stderr: int


def fork_spare() -> Spare | Orders:
    """Returns twice: at once in the runner, and in the spare when it is needed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    runner_pid = os.getpid()
    pid = os.fork()
    if pid != 0:
        theirs.close()
        return Spare(pid, ours)
    die_with_parent(runner_pid, signal.SIGKILL)
    ours.close()
    child.warm_up()
    try:
        data, descriptors, _, _ = socket.recv_fds(theirs, MAX_LAUNCH_BYTES + 1, 2)
    except OSError:
        os._exit(0)
    if not data:
        os._exit(0)
    stdout, stderr = descriptors
    return Orders(Launch.from_values(json.loads(data)), stdout, stderr)
