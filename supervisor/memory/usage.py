"""How much memory a job uses: cheaply as an upper bound, and exactly at a price.

Charged is what the job's process tree made its own: anonymous memory, shared memory and swap, each page
once, however many processes of the tree map it. Not charged: file cache and mapped files, which the kernel
can drop, and pages that a fork inherited from the runner and has not written. In no process's numbers, and
so not seen: files in /dev/shm that nobody maps, huge pages from the reserved pool, memory of devices.

The cheap reading (1 microsecond, a kept-open /proc/PID/statm) counts a page once per process; the exact one
(/proc/PID/smaps_rollup, 17 microseconds per MB, proportional shares) knows what is shared. Processes come
and go while they are read: one that is gone counts nothing. Outside Linux both are the resident set size of
psutil.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from supervisor.processes import ProcessStat, children, descendants, process_stat, resident_bytes

_LINUX = sys.platform == "linux"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MAX_KEPT_OPEN = 64
_SAME_MEMORY_TRIES = 5
_MANY = 20
_CHILDREN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What one process is charged, in bytes: its own pages and its share of those that others map too.

    `anonymous` is private memory with swap, `shared` shared memory. `uncharged` are the bytes that the cheap
    reading counts as this process's anonymous memory, but that are charged to others or to nobody.
    """

    pid: int
    anonymous: int
    shared: int
    uncharged: int = 0

    @property
    def charged(self) -> int:
        return self.anonymous + self.shared


def tree_usage(
    runner_pid: int,
    *,
    pids: Iterable[int] | None = None,
    skip: Collection[int] = (),
    enough: int | None = None,
) -> dict[int, ProcessUsage]:
    """The exact usage of every living descendant of the runner, by pid, without those in `skip`.

    Their `charged` add up to what the job uses. `pids` names the descendants if they are known already. A
    process that runs in its parent's memory (between vfork and exec) is left out: it has none of its own. Of a
    tree of many processes no more are read once they come to more than `enough`.
    """
    inherited = _Inherited(runner_pid)
    usages: dict[int, ProcessUsage] = {}
    found = 0
    for pid in descendants(runner_pid, skip) if pids is None else pids:
        if enough is not None and found > enough and len(usages) >= _MANY:
            break
        process = process_stat(pid)
        if process is not None and not process.ended:
            usage = _usage_of(process, inherited)
            if usage is not None:
                usages[pid] = usage
                found += usage.charged
    return usages


class _Inherited:
    """What forks of the runner have from it: their proportional share of its pages, in bytes."""

    def __init__(self, runner_pid: int) -> None:
        self._runner = process_stat(runner_pid)
        self._bytes: int | None = None

    def share_of(self, process: ProcessStat) -> int:
        if self._runner is None or process.image is None or process.image != self._runner.image:
            return 0  # it executed something else: nothing is left of what it inherited
        if self._bytes is None:
            rollup = _kilobyte_fields(_read(f"/proc/{self._runner.pid}/smaps_rollup"))
            self._bytes = _shared_anonymous(rollup) if "Pss_Anon" in rollup else 0
        return self._bytes


def _usage_of(process: ProcessStat, inherited: _Inherited) -> ProcessUsage | None:
    if not _LINUX:
        return ProcessUsage(process.pid, resident_bytes(process.pid), 0)
    if _borrows_memory(process):
        return None
    rollup = _kilobyte_fields(_read(f"/proc/{process.pid}/smaps_rollup"))
    if "Pss_Anon" not in rollup:
        return _usage_without_rollup(process.pid, rollup.get("Pss"))
    # The runner's share of a page is as large as the fork's while both map it. What the fork wrote since is
    # private to it: never take off more than it shares at all.
    not_its_own = min(inherited.share_of(process), _shared_anonymous(rollup))
    anonymous = rollup["Pss_Anon"] - not_its_own + rollup["SwapPss"]
    counted = rollup["Anonymous"] + rollup["Swap"]
    return ProcessUsage(process.pid, anonymous, rollup["Pss_Shmem"], max(0, counted - anonymous))


def _shared_anonymous(rollup: dict[str, int]) -> int:
    """The share of anonymous pages that other processes map too."""
    # Private_Dirty holds the private anonymous pages, and with them private pages of shared memory and of
    # files.
    dirty_files = max(0, rollup.get("Pss_Dirty", 0) - rollup["Pss_Anon"] - rollup["Pss_Shmem"])
    private = max(0, rollup["Private_Dirty"] - rollup["Pss_Shmem"] - dirty_files)
    return max(0, rollup["Pss_Anon"] - private)


def _usage_without_rollup(pid: int, proportional: int | None) -> ProcessUsage | None:
    """For old kernels and for processes that hide their pages (setuid programs).

    Shared pages count in full, unless there is at least one `proportional` sum for everything, files
    included.
    """
    status = _kilobyte_fields(_read(f"/proc/{pid}/status"))
    if "RssAnon" not in status:
        return None
    anonymous, shared, swap = status["RssAnon"], status["RssShmem"], status["VmSwap"]
    if proportional is not None and proportional < anonymous + shared:
        return ProcessUsage(pid, proportional + swap, 0, anonymous + shared - proportional)
    return ProcessUsage(pid, anonymous + swap, shared)


def _borrows_memory(process: ProcessStat) -> bool:
    """Whether it runs in its parent's memory: between vfork and exec, as subprocess starts every program.

    Both then tell the same numbers, of the same pages. A fork tells others than its parent: it starts
    without the pages of mapped files.
    """
    for _ in range(_SAME_MEMORY_TRIES):
        parent_before = _read(f"/proc/{process.parent}/statm")
        own = _read(f"/proc/{process.pid}/statm")
        if parent_before == _read(f"/proc/{process.parent}/statm"):  # else it changed in between: look again
            return own is not None and own == parent_before
    return False


class CheapReading:
    """A process of a watched tree, read often.

    `anonymous` (with swap) and `shared` are its bytes when `refresh` looked last; pages that others map too
    count in full. `resident` are its pages of any kind. Its files in /proc stay open: opening them costs ten times
    as much as reading them.
    """

    __slots__ = ("_file_and_shared_pages", "_files", "_refreshed_at", "_swap", "anonymous", "pid", "resident", "shared")

    _kept_open = 0

    def __init__(self, pid: int) -> None:
        """Raises OSError when the process is gone."""
        self.pid = pid
        self.anonymous = 0
        self.shared = 0
        self.resident = 0
        self._swap = 0
        self._file_and_shared_pages = -1
        self._refreshed_at = 0.0
        self._files: _ProcFiles | None = None
        # The limit: a job of a thousand processes must not take all descriptors of its runner.
        if _LINUX and CheapReading._kept_open < _MAX_KEPT_OPEN:
            self._files = _ProcFiles(pid)
            CheapReading._kept_open += 1

    def close(self) -> None:
        if self._files is not None:
            self._files.close()
            self._files = None
            CheapReading._kept_open -= 1

    def children(self) -> list[int]:
        """As `processes.children` tells them."""
        found = self._files.children() if self._files is not None else None
        return children(self.pid) if found is None else found

    @property
    def total(self) -> int:
        return self.anonymous + self.shared

    def refresh(self, now: float, max_age: float) -> bool:
        """Look again; False when the process is gone. Swap may be `max_age` seconds old."""
        if not _LINUX:
            self.anonymous = resident_bytes(self.pid)
            return self.anonymous > 0
        statm = self._read_statm()
        if statm is None:
            return False
        _, resident, file_and_shared, _ = statm.split(None, 3)
        pages = int(file_and_shared)
        self.resident = int(resident)
        # Only the status, ten times as dear, tells files from shared memory and knows of swap.
        if pages != self._file_and_shared_pages or now - self._refreshed_at >= max_age:
            status = _read(f"/proc/{self.pid}/status") or b""
            self.shared = _kilobyte_field(status, b"\nRssShmem:")
            self._swap = _kilobyte_field(status, b"\nVmSwap:")
            self._file_and_shared_pages = pages
            self._refreshed_at = now
        self.anonymous = (self.resident - pages) * _PAGE + self._swap
        return True

    def _read_statm(self) -> bytes | None:
        return _read(f"/proc/{self.pid}/statm") if self._files is None else self._files.statm()


class _ProcFiles:
    """Open files of one process: they never tell of another, even if its id is used again."""

    __slots__ = ("_children", "_statm", "_threads")

    def __init__(self, pid: int) -> None:
        self._statm = self._threads = self._children = -1
        try:
            self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
            self._threads = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(FileNotFoundError):  # a kernel without these files
                self._children = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for fd in (self._statm, self._threads, self._children):
            if fd >= 0:
                os.close(fd)

    def statm(self) -> bytes | None:
        try:
            return os.pread(self._statm, 128, 0)
        except ProcessLookupError:
            return None

    def children(self) -> list[int] | None:
        """Those of a process with a single thread; None when there is more to read than that."""
        try:
            if self._children < 0 or os.fstat(self._threads).st_nlink != 3:
                return None
            content = os.pread(self._children, _CHILDREN_BYTES, 0)
        except OSError:
            return []
        return None if len(content) > _CHILDREN_BYTES // 2 else [int(pid) for pid in content.split()]


def _kilobyte_fields(content: bytes | None) -> dict[str, int]:
    """The fields of smaps_rollup or status that are given in kB, in bytes."""
    fields = {}
    for line in (content or b"").splitlines():
        if line.endswith(b" kB"):
            name, value, _ = line.split()
            fields[name[:-1].decode("ascii")] = int(value) << 10
    return fields


def _kilobyte_field(content: bytes, name: bytes) -> int:
    start = content.find(name)
    return 0 if start < 0 else int(content[start + len(name) : content.index(b"kB", start)]) << 10


def _read(path: str) -> bytes | None:
    """None when the process is gone or hides this from us."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 1 << 16)
        finally:
            os.close(fd)
    except OSError:
        return None
