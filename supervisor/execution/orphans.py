"""Processes that a killed supervisor left behind: found by a mark in their environment, and ended.

The mark names the supervisor's process beyond doubt (PID namespace, PID, start time). The warm interpreter is started
with it, and everything below inherits it. So a new supervisor can end what no living one answers for, before it claims
anything. A process that cleared its environment *and* outlived the killing of everybody else hides from this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from supervisor.processes import ProcessRef, pid_namespace

MARKER = "JOB_SUPERVISOR"
PATIENCE_SECONDS = 5.0


def marker(supervisor_pid: int) -> str:
    """The mark of what belongs to this supervisor."""
    return f"{pid_namespace()}/{supervisor_pid}/{ProcessRef.of(supervisor_pid).started}"


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
    return next((os.fsdecode(entry[len(prefix) :]) for entry in variables if entry.startswith(prefix)), None)


def _is_answered_for(mark: str) -> bool:
    """Whether its supervisor lives, or cannot be judged from here."""
    namespace, _, process = mark.partition("/")
    pid, _, started = process.partition("/")
    if namespace != pid_namespace() or not pid.isdigit() or not started.isdigit():
        return True
    return ProcessRef(int(pid), int(started)).is_alive()
