"""Processes that a killed supervisor left behind: found by a mark in their environment or their limits, and ended.

The mark names the supervisor's process beyond doubt (PID namespace, PID, start time). The warm interpreter is started
with it, and everything below inherits it. So a new supervisor can end what no living one answers for, before it claims
anything. A process may clear its environment; then it still has the same mark in a resource limit that never applies:
how many microseconds of CPU time a real-time process may use at a stretch, a number of some 100,000 years.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time

import psutil

from supervisor.processes import ProcessRef, pid_namespace

MARKER = "JOB_SUPERVISOR"
PATIENCE_SECONDS = 5.0
_LIMIT = getattr(resource, "RLIMIT_RTTIME", None) if sys.platform == "linux" else None
_LIMIT_NAME = b"Max realtime timeout"
_TAG = 1 << 62
_PID_BITS = 22
"""The kernel's PID_MAX_LIMIT; above them there is room for 300 years of clock ticks."""


def marker(supervisor_pid: int) -> str:
    """The mark of what belongs to this supervisor."""
    return f"{pid_namespace()}/{supervisor_pid}/{ProcessRef.of(supervisor_pid).started}"


def mark_limits(pid: int, supervisor_pid: int) -> None:
    """Marks a process, and with it what it will start. Where that cannot be done the environment has to do."""
    started = ProcessRef.of(supervisor_pid).started
    value = _TAG | started << _PID_BITS | supervisor_pid
    if _LIMIT is not None and value < 1 << 63:
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, _LIMIT, (value, resource.prlimit(pid, _LIMIT)[1]))


def end_orphans() -> int:
    """Ends every process whose supervisor is gone, until none is left; returns how many there were."""
    ended: set[int] = set()
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        found = [process for process in _marked() if process.pid != os.getpid()]
        if not found:
            break
        for process in found:
            ended.add(process.pid)
            with contextlib.suppress(OSError):
                _kill(process)
        time.sleep(0.005)
    return len(ended)


def _kill(process: ProcessRef) -> None:
    pidfd = os.pidfd_open(process.pid)
    try:
        if process.is_alive():  # the descriptor pins the process, so this is about it and no other
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _marked() -> list[ProcessRef]:
    found = []
    for pid in psutil.pids():
        mark = _mark_of(pid)
        if mark is not None and not _is_answered_for(mark):
            with contextlib.suppress(ProcessLookupError):
                process = ProcessRef.of(pid)
                if process.is_alive():
                    found.append(process)
    return found


def _mark_of(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:
        return None
    prefix = MARKER.encode() + b"="
    mark = next((os.fsdecode(entry[len(prefix) :]) for entry in variables if entry.startswith(prefix)), None)
    return mark or _mark_in_limits(pid)


def _mark_in_limits(pid: int) -> str | None:
    """The same mark; the namespace is that of the process, since a limit has no room for it."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:
            lines = file.read().splitlines()
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
    for line in lines:
        if line.startswith(_LIMIT_NAME):
            text = line[len(_LIMIT_NAME) :].split()[0]
            value = int(text) if text.isdigit() else 0
            if value & _TAG and value < _TAG << 1:
                return f"{namespace}/{value & (1 << _PID_BITS) - 1}/{(value ^ _TAG) >> _PID_BITS}"
    return None


def _is_answered_for(mark: str) -> bool:
    """Whether its supervisor lives, or cannot be judged from here."""
    namespace, _, process = mark.partition("/")
    pid, _, started = process.partition("/")
    if namespace != pid_namespace() or not pid.isdigit() or not started.isdigit():
        return True
    return ProcessRef(int(pid), int(started)).is_alive()
