"""Processes of this host: who they are, who descends from whom, and how a whole tree is ended.

The only module that knows prctl, pidfd and waitpid. A subreaper inherits every orphan among its descendants,
so nothing that a job starts can escape by daemonizing, and `waitpid` saying ECHILD *proves* that nothing is
left. If the subreaper itself dies, its children die by `die_with_parent` and the orphans fall to the next
subreaper above. A bare process id is never trusted: before a signal is sent, the process is pinned by a pidfd
and its line of parents is followed up to the root. Outside Linux there is no subreaper; what is possible is
done through psutil, which is imported only there: every job would inherit it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource  # noqa: F401 - os.wait4() imports it at its first call, in a runner: each job would see a new library
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from os import getppid  # by this name a new process finds it without writing to a page
from pathlib import Path

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_STOP_PASSES = 100
# Without use_errno and types of its arguments, a call touches 8 pages instead of 92 in a process that was just forked.
_prctl_call = ctypes.CDLL(None).prctl if _LINUX else None


def clock() -> float:
    """Seconds since boot, the same for all processes of the host; counts suspension where it can."""
    if _LINUX:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def boot_id() -> str:
    """An identifier that changes with every boot of the host: process start times compare only within one."""
    if _LINUX:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    import psutil

    return f"boot-{int(psutil.boot_time())}"


def pid_namespace() -> str:
    """Identifies the PID namespace: process ids mean something only within one. Empty where there is none."""
    return os.readlink("/proc/self/ns/pid") if _LINUX else ""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What the kernel says of a process in one read.

    `started` is in clock ticks since boot; `image` identifies what it executes: a fork keeps it, an exec
    changes it (None when hidden from us). `page_faults` were served without a disk: each gave it a page, or a
    copy of one. `ended` means that only its exit status is left, `stopped` that a signal has stopped it.
    """

    pid: int
    parent: int
    started: int
    image: int | None
    ended: bool
    page_faults: int = 0
    stopped: bool = False


def process_stat(pid: int) -> ProcessStat | None:
    """The process with this id, or None when there is none."""
    return _stat_from_proc(pid) if _LINUX else _stat_from_psutil(pid)


def _stat_from_proc(pid: int) -> ProcessStat | None:
    content = _read(f"/proc/{pid}/stat")
    if content is None:
        return None
    fields = content[content.rindex(b")") + 2 :].split()  # the name may hold spaces and parentheses
    # A main thread that ended looks like a zombie while other threads live on: the process has not ended.
    ended = fields[0] in b"ZX" and int(fields[17]) <= 1
    # The stack's address is drawn anew by every exec; unlike arg_start no process sets it for its title.
    stack = int(fields[25])
    return ProcessStat(pid, int(fields[1]), int(fields[19]), stack or None, ended, int(fields[7]), fields[0] == b"T")


def _stat_from_psutil(pid: int) -> ProcessStat | None:
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            ended = process.status() == psutil.STATUS_ZOMBIE
            return ProcessStat(pid, process.ppid(), int(process.create_time() * 1e6), None, ended)
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process and no other: its id with its start time (clock ticks since boot): ids are used again."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """Raises ProcessLookupError when no such process exists."""
        found = process_stat(pid)
        if found is None:
            raise ProcessLookupError(pid)
        return cls(pid, found.started)

    def is_alive(self) -> bool:
        """False once it ended, even when nobody has reaped it or its id belongs to another process now."""
        found = process_stat(self.pid)
        return found is not None and found.started == self.started and not found.ended


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children from now on. No effect outside Linux."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def run_before_others() -> None:
    """This process, but nothing that it forks, gets the processor when it wants it: jobs must not starve who watches
    them. Has no effect without the privilege, or where the operator chose a priority for all of it."""
    if _LINUX and os.getpriority(os.PRIO_PROCESS, 0) == 0 and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def die_with_parent(parent_pid: int, sig: int) -> None:
    """To be called first in a new child: the kernel sends it `sig` when its parent ends.

    Exits with 1 at once when the parent is gone already. The signal comes when the *thread* that forked ends,
    so only children of single-threaded parents may use it. An exec keeps the setting, a fork does not.
    """
    # Not by way of `_prctl`: every job comes through here, and would copy the pages of one more function.
    if _prctl_call is not None and _prctl_call(_PR_SET_PDEATHSIG, sig, 0, 0, 0) != 0:
        raise OSError(f"prctl({_PR_SET_PDEATHSIG}, {sig}) failed")
    if getppid() != parent_pid:
        os._exit(1)


def become_user(ids: Sequence[int]) -> None:
    """Gives up root for good: a user id, then group ids, the primary group first. Raises OSError.

    The kernel forgets the parent-death signal here, so `die_with_parent` comes afterwards. The process stays
    readable to itself (/proc/self), as after an exec.
    """
    user, *groups = ids
    os.setgroups(groups)
    os.setresgid(groups[0], groups[0], groups[0])
    os.setresuid(user, user, user)
    _prctl(_PR_SET_DUMPABLE, 1)


def _prctl(option: int, value: int) -> None:
    if _prctl_call is not None and _prctl_call(option, value, 0, 0, 0) != 0:
        raise OSError(f"prctl({option}, {value}) failed")


def set_oom_score_adj(value: int, pid: int | None = None) -> None:
    """Make the kernel's out-of-memory killer prefer this process, or `pid` (up to 1000). Only raises; never fails."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(f"/proc/{pid or 'self'}/oom_score_adj")
        if int(path.read_text("ascii")) < value:
            path.write_text(str(min(value, 1000)), "ascii")


def has_pending_signal(pid: int, number: int) -> bool:
    """Whether the signal was sent to the process and has not reached it yet. False where it cannot be told."""
    content = _read(f"/proc/{pid}/status") or b""
    pending = 0
    for line in content.splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")):
            pending |= int(line.split()[1], 16)
    return bool(pending >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    """The children of a process, ended but not reaped ones too; empty when it is gone.

    Not a proof: while children exit, the kernel may leave others out.
    """
    if not _LINUX:
        return _children_from_psutil(pid)
    found: list[int] = []
    for thread in _threads(pid):
        content = _read(f"/proc/{pid}/task/{thread}/children")
        if content is not None:
            found += map(int, content.split())
        elif not _HAS_CHILDREN_FILES:
            return _children_from_psutil(pid)
    return found


def _threads(pid: int) -> Collection[int | str]:
    """Children belong to the thread that forked them."""
    tasks = f"/proc/{pid}/task"
    try:
        if os.stat(tasks).st_nlink == 3:  # ".", ".." and the main thread: half the price for most processes
            return (pid,)
        return os.listdir(tasks)
    except OSError:
        return ()


_HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def _children_from_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def descendants(root: int, skip: Collection[int] = (), children_of: Callable[[int], list[int]] = children) -> list[int]:
    """All descendants of `root`, parents before children; without those in `skip` and all below them."""
    seen: dict[int, None] = {}
    pending = [root]
    while pending:
        for child in children_of(pending.pop()):
            if child not in seen and child not in skip and child != root:
                seen[child] = None
                pending.append(child)
    return list(seen)


def signal_descendants(root: int, sig: int, skip: Collection[int] = ()) -> int:
    """Send `sig` to every descendant of `root`; returns how many got it."""
    tree = _Tree(root)
    return sum(tree.signal(pid, sig) for pid in descendants(root, skip))


class _Tree:
    """Sends signals to descendants of `root` and nobody else, however quickly process ids are used again."""

    def __init__(self, root: int) -> None:
        self._verified = {root}

    def signal(self, pid: int, sig: int) -> bool:
        """False when the process is gone, has ended, or is no descendant (any more)."""
        with _pinned(pid) as pidfd:
            found = process_stat(pid)
            if found is None or not self._descends(found):
                return False
            try:
                if pidfd is None:
                    os.kill(pid, sig)
                else:
                    signal.pidfd_send_signal(pidfd, sig)
            except OSError:
                return False
            return not found.ended

    def _descends(self, process: ProcessStat) -> bool:
        line = []
        current: ProcessStat | None = process
        while current is not None:
            line.append(current.pid)
            if current.parent in self._verified:
                self._verified.update(line)
                return True
            current = process_stat(current.parent) if current.parent > 1 else None
        return False


@contextlib.contextmanager
def _pinned(pid: int) -> Iterator[int | None]:
    """A pidfd, so that the process that is examined is the one that gets the signal; None without pidfds."""
    pidfd = None
    if _LINUX:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def reap(skip: Collection[int] = ()) -> dict[int, int]:
    """Collect the children that have ended, without waiting: exit code by pid, negative = that signal.

    Those in `skip` are left for whoever waits for them.
    """
    if skip:
        return _reap_one_by_one(skip)
    statuses: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return statuses
        if pid == 0:
            return statuses
        statuses[pid] = os.waitstatus_to_exitcode(status)


def _reap_one_by_one(skip: Collection[int]) -> dict[int, int]:
    statuses: dict[int, int] = {}
    for child in children(os.getpid()):
        if child in skip:
            continue
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid != 0:
                statuses[pid] = os.waitstatus_to_exitcode(status)
    return statuses


@dataclass(frozen=True, slots=True)
class Collected:
    """Children that have ended. `none_left` proves that no other child, and so no descendant of a subreaper, is."""

    exit_codes: dict[int, int]
    peak_rss_bytes: dict[int, int]
    """The kernel's count, which begins with what the process inherited by fork."""
    none_left: bool


def collect() -> Collected:
    """Collect the children that have ended, without waiting, and say whether any is left."""
    exit_codes: dict[int, int] = {}
    peaks: dict[int, int] = {}
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return Collected(exit_codes, peaks, True)
        if pid == 0:
            return Collected(exit_codes, peaks, False)
        exit_codes[pid] = os.waitstatus_to_exitcode(status)
        peaks[pid] = usage.ru_maxrss * (1024 if _LINUX else 1)


@dataclass(frozen=True, slots=True)
class KillReport:
    """How a tree ended. `complete` is False when something was left at the deadline (stuck in the kernel)."""

    killed: int
    complete: bool
    statuses: dict[int, int] = field(default_factory=dict)


def kill_descendants(root: int, skip: Collection[int] = (), deadline: float = 10.0) -> KillReport:
    """End every descendant of `root`, the calling process and a subreaper, within `deadline` seconds.

    All are stopped first, pass after pass until nobody new appears, so that none can fork away from the kill.
    Returns when nothing is left but `skip`, with the exit codes of those that were reaped on the way. Raises
    ValueError when `root` is another process.
    """
    if root != os.getpid():
        raise ValueError("only the descendants of the calling process can be killed and reaped")
    give_up = time.monotonic() + deadline
    killed = stop_descendants(root, skip, give_up)
    statuses: dict[int, int] = {}
    pause = 0.0005
    while True:
        tree = _Tree(root)
        killed.update(pid for pid in descendants(root, skip) if tree.signal(pid, signal.SIGKILL))
        statuses |= reap(skip)
        if _nothing_left(root, skip):
            return KillReport(len(killed), True, statuses)
        if time.monotonic() > give_up:
            return KillReport(len(killed), False, statuses)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.005)


def stop_descendants(root: int, skip: Collection[int] = (), give_up: float = math.inf) -> set[int]:
    """Stop every descendant of `root`, until nobody new appears; returns those that were alive and are stopped now.

    `give_up` is a time of `time.monotonic()`.
    """
    asked: set[int] = set()
    stopped: set[int] = set()
    for _ in range(_STOP_PASSES):
        new = [pid for pid in descendants(root, skip) if pid not in asked]
        if not new or time.monotonic() > give_up:
            break
        tree = _Tree(root)
        stopped.update(pid for pid in new if tree.signal(pid, signal.SIGSTOP))
        asked.update(new)
    return stopped


def await_stopped(pids: Collection[int], seconds: float) -> set[int]:
    """Those that have come to a stop; waits for the others no longer than this.

    A process that was sent SIGSTOP stops when it leaves the kernel, for which it needs the processor.
    """
    give_up = time.monotonic() + seconds
    while True:
        states = {pid: process_stat(pid) for pid in pids}
        waiting = [state for state in states.values() if state is not None and not (state.stopped or state.ended)]
        if not waiting or time.monotonic() > give_up:
            return {pid for pid, state in states.items() if state is not None and state.stopped}
        time.sleep(0.001)


def _nothing_left(root: int, skip: Collection[int]) -> bool:
    try:
        # WNOWAIT: looks, but leaves the exit status for whoever is to reap it.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    if not skip or descendants(root, skip):
        return False
    # The children files may leave somebody out, and beside a child that stays there is no ECHILD: look twice.
    return not any(parent == root and pid not in skip for pid, parent in _parents())


def _parents() -> Iterator[tuple[int, int]]:
    for pid in _pids():
        found = process_stat(pid)
        if found is not None:
            yield pid, found.parent


def _pids() -> list[int]:
    if _LINUX:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    import psutil

    return psutil.pids()


def resident_bytes(pid: int) -> int:
    """The memory that a process has in RAM, shared or not; 0 when it is gone."""
    if _LINUX:
        content = _read(f"/proc/{pid}/statm")
        return int(content.split()[1]) * os.sysconf("SC_PAGE_SIZE") if content else 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def command_line(pid: int) -> str:
    """The command line of a process, its name where it has none; empty when it is gone."""
    if _LINUX:
        content = _read(f"/proc/{pid}/cmdline") or _read(f"/proc/{pid}/comm") or b""
        return os.fsdecode(content.rstrip(b"\0\n").replace(b"\0", b" "))
    import psutil

    try:
        process = psutil.Process(pid)
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def processes_with_environment(name: str, value: str) -> list[ProcessRef]:
    """The living processes that were started with this variable, if this user may see their environment."""
    marker = os.fsencode(f"{name}={value}")
    found = []
    for pid in _pids():
        process = process_stat(pid)
        if process is not None and not process.ended and marker in _environment(pid):
            found.append(ProcessRef(pid, process.started))
    return found


def _environment(pid: int) -> list[bytes]:
    if _LINUX:
        return (_read(f"/proc/{pid}/environ") or b"").split(b"\0")
    import psutil

    try:
        return [os.fsencode(f"{name}={value}") for name, value in psutil.Process(pid).environ().items()]
    except (psutil.Error, OSError):
        return []


def _read(path: str) -> bytes | None:
    """The whole file, or None when the process it belongs to is gone or hidden from us."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.read(fd, 1 << 16)
            while more := os.read(fd, 1 << 16):
                content += more
            return content
        finally:
            os.close(fd)
    except OSError:
        return None
