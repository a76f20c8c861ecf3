"""A PID namespace for each job, so that none of its processes can outlive those that watch it, whatever it does.

    runner ──fork──► init ──fork──► job ──► whatever it starts

A daemon that takes off its marks (orphans.py) on purpose could hide from the next supervisor when all of ours are
killed at once. Not here: `init` is process 1 of the namespace and dies with the runner, and the kernel ends a namespace
with its process 1. It adopts orphans, and when the job's main process has ended it reports how, and ends.

The job's own process id is 2 and its parent's is 1; /proc still shows the host's ids unless the job mounts its own.
Needs root or CAP_SYS_ADMIN.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

from supervisor.processes import children, descendants, die_with_parent, process_stat

INIT_PID = 1
"""Of the parent of a job, as the job sees it."""
MAIN_PID = 2
_CLONE_NEWPID = 0x2000_0000
_HIGHEST_DESCRIPTOR = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def why_not_possible() -> str | None:
    """Why this process may not make PID namespaces; None when it may. Tried by doing it, in a process of its own."""
    if sys.platform != "linux":
        return "there are PID namespaces on Linux only"
    trial = os.fork()
    if trial == 0:
        os._exit(_try())
    error = os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1])
    return None if error == 0 else os.strerror(abs(error)).lower()


def _try() -> int:
    """The number of the error, 0 for none."""
    try:
        isolation = Isolation()
        init = isolation.fork()
        if init == 0:
            os._exit(0)
        return isolation.outcome(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]))[0] or 0
    except OSError as error:
        return error.errno or 1


class Isolation:
    """Forks one job after the other for the calling process, the runner, each into a PID namespace of its own."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._runner = os.pidfd_open(os.getpid())
        self._report = -1

    def fork(self) -> int:
        """The process id of the job's `init` in the runner, and 0 in the job. Raises OSError, in `init` too."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = self._fork_init()
        except OSError:
            os.close(reader)
            os.close(writer)
            raise
        if pid == 0:
            os.close(reader)
            _be_init(self._runner, writer)
            return 0
        os.close(writer)
        self._report = reader
        return pid

    def _fork_init(self) -> int:
        _check(_libc.unshare(_CLONE_NEWPID))  # of what is forked from here on, not of this process
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid != 0:
                _check(_libc.setns(self._home, _CLONE_NEWPID))
        return pid

    def outcome(self, init_exit_code: int | None) -> tuple[int | None, int]:
        """The exit code of the job's main process, and how many processes it left running.

        To be asked when `init` has been reaped: then nothing of the job is left. If it was killed, so was the job.
        """
        report, self._report = self._report, -1
        if report < 0:
            return init_exit_code, 0
        with os.fdopen(report, "rb", buffering=0) as file:
            values = (file.read() or b"").split()
        return (int(values[0]), int(values[1])) if len(values) == 2 else (init_exit_code, 0)


def main_process(init: int) -> int | None:
    """The job's main process below its `init`, both as the caller sees them; None when it has ended."""
    return next((pid for pid in children(init) if _innermost_pid(pid) == MAIN_PID), None)


def signal_main_process(init: int, number: int) -> None:
    """Sends it a signal, and nobody else, even if its id is used again meanwhile."""
    pid = main_process(init)
    if pid is None:
        return
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if main_process(init) == pid:  # the descriptor pins the process, so this is about it and no other
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _be_init(runner: int, report: int) -> None:
    """Returns in the job only. `runner` is a pidfd: from in here the parent's id is always 0."""
    die_with_parent(0, signal.SIGKILL)
    poll = select.poll()
    poll.register(runner, select.POLLIN)
    if poll.poll(0):
        os._exit(1)  # it ended before it was to take this process along
    job = os.fork()
    if job == 0:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # SIGTERM to the whole job is not for this one
    os.closerange(3, report)
    os.closerange(report + 1, _HIGHEST_DESCRIPTOR)
    pid, status = 0, 0
    while pid != job:
        pid, status = os.waitpid(-1, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)} {_count_descendants()}".encode())
    os._exit(0)


def _count_descendants() -> int:
    """Those of the calling process that are alive. /proc knows it by another id."""
    found = map(process_stat, descendants(int(os.readlink("/proc/self"))))
    return sum(process is not None and not process.ended for process in found)


def _innermost_pid(pid: int) -> int | None:
    """The process's id in its own namespace."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        for line in file.read().splitlines():
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    return None


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
