"""The script of every job of the chaos run: `job.py RECORDS KIND [ARGUMENT]`.

It tells the truth about itself in RECORDS/<job id>: one line for each begin, beat and end of an attempt, with the
clock that all processes of a host share. Beats come from every process of the attempt, so that an attempt that was
killed is known to have lasted at least until its last beat.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

BEAT_SECONDS = 0.05
FOREVER_SECONDS = 120.0
"""So that a run that went wrong cleans up after itself in the end."""


def record(path: str, attempt: str, event: str, *, lasting: bool = False) -> None:
    line = f"{event} {attempt} {os.getpid()} {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
        if lasting:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Attempt:
    def __init__(self, path: str, attempt: str) -> None:
        self._path, self._attempt = path, attempt

    def record(self, event: str) -> None:
        record(self._path, self._attempt, event, lasting=True)

    def beat(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            record(self._path, self._attempt, "beat")
            time.sleep(BEAT_SECONDS)

    def failures(self) -> int:
        with open(self._path, encoding="ascii") as file:
            return sum(line.startswith("failed ") for line in file)

    def apart(self, environment: dict[str, str]) -> None:
        """Leaves a daemon behind: a session of its own, no parent of ours, and an environment as given."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                command = [sys.executable, "-I", "-S", __file__, self._path, "daemon", self._attempt]
                os.execve(sys.executable, command, environment)
            os._exit(0)
        os.wait()


def short(attempt: Attempt, _: float) -> None:
    pass


def long(attempt: Attempt, seconds: float) -> None:
    attempt.beat(seconds)


def lasting(attempt: Attempt, seconds: float) -> None:
    attempt.beat(seconds)


def flaky(attempt: Attempt, failures: float) -> None:
    if attempt.failures() < failures:
        attempt.record("failed")
        sys.exit(3)


def hog(attempt: Attempt, megabytes: float) -> None:
    blocks = []
    for _ in range(int(megabytes / 8)):
        blocks.append(b"x" * (8 << 20))
        attempt.beat(0.01)


def forking(attempt: Attempt, seconds: float) -> None:
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            attempt.beat(seconds)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def daemonizing(attempt: Attempt, seconds: float) -> None:
    attempt.apart(dict(os.environ))
    attempt.beat(seconds)


def hiding(attempt: Attempt, seconds: float) -> None:
    attempt.apart({})
    attempt.beat(seconds)


def stubborn(attempt: Attempt, seconds: float) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 120"])
    attempt.beat(seconds)


def talking(attempt: Attempt, megabytes: float) -> None:
    line = b"the quick brown fox jumps over the lazy dog \xff\0" * 20 + b"\n"
    for _ in range(int(megabytes * (1 << 20) / len(line))):
        sys.stdout.buffer.write(line)
    sys.stdout.flush()


KINDS: dict[str, Callable[[Attempt, float], None]] = {
    kind.__name__: kind for kind in (short, long, lasting, flaky, hog, forking, daemonizing, hiding, stubborn, talking)
}


def main() -> None:
    path, kind, argument = sys.argv[1:]
    if kind == "daemon":
        Attempt(path, argument).beat(FOREVER_SECONDS)
        return
    attempt = Attempt(os.path.join(path, os.environ["JOB_ID"]), os.environ["JOB_ATTEMPT"])
    attempt.record("begin")
    KINDS[kind](attempt, float(argument))
    attempt.record("done")


if __name__ == "__main__":
    main()
