"""A job at rest, and what tells that it moves: much cheaper to look at than its memory.

A process that has not run since has neither taken memory nor started anything. One that has run, but is far from its
limit, is at rest as long as it has started nothing and its resident pages have hardly become more. A runner that is
woken for this costs 50 to 200 microseconds of cold caches each time, so it hands a job at rest to the one lookout
(`supervisor.lookout`), to which all jobs together cost less than one wake-up of each runner.

    MemoryMonitor ──at_rest()──► Rest ──descriptors, what they read──► WatchedRest ──has_moved()──► the runner looks
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from supervisor.messages import MAX_DESCRIPTORS, AtRest

MAX_FILES = MAX_DESCRIPTORS - 1
"""The pipe comes first."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
FASTEST_GROWTH = 4 << 30
"""Bytes per second that a job can allocate at most, by our reckoning."""
STILL_INTERVAL = 0.008
"""The shortest for a job that does not grow: many that rest near their limits must not take a whole core."""
SCHEDSTAT_BYTES = 64


class Rest:
    """What a runner hands over: open files of the job's processes, and what they have to go on saying.

    `room` is how many bytes the job may surely grow before it is at its limit; with none, it may not even run.
    """

    def __init__(self, room: int, tolerance: int, interval: float) -> None:
        self.descriptors: list[int] = []
        self._room, self._tolerance, self._interval = room, tolerance, interval
        self._children: list[bytes] = []
        self._processes: list[tuple[int, int]] = []

    @classmethod
    def of_tree(
        cls, runner_pid: int, resident: Mapping[int, int], *, room: int, tolerance: int, interval: float
    ) -> Rest | None:
        """None where there is more to watch than is cheap, somebody unknown, or a kernel without these files.

        `resident` are the pages of each known process of the job, which can be closed by `close` only.
        """
        rest = cls(room, tolerance, interval)
        try:
            if rest._open(runner_pid, resident):
                return rest
        except OSError:
            pass
        rest.close()
        return None

    def _open(self, runner_pid: int, resident: Mapping[int, int]) -> bool:
        """The runner's own children first: orphans of the job become that."""
        self._children.append(self._read(f"/proc/{runner_pid}/task/{runner_pid}/children"))
        for pid, pages in resident.items():
            threads = os.listdir(f"/proc/{pid}/task")
            if len(self.descriptors) + 2 + 2 * len(threads) > MAX_FILES:
                return False
            self._keep_open(f"/proc/{pid}/statm")
            self._keep_open(f"/proc/{pid}/task")
            for thread in threads:
                self._keep_open(f"/proc/{pid}/task/{thread}/schedstat")
                self._children.append(self._read(f"/proc/{pid}/task/{thread}/children"))
            self._processes.append((pages, len(threads)))
        known = {*resident}
        return all(int(pid) in known for content in self._children for pid in content.split())

    def _read(self, path: str) -> bytes:
        return os.pread(self._keep_open(path), 4096, 0)

    def _keep_open(self, path: str) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.descriptors.append(descriptor)
        return descriptor

    def message(self) -> AtRest:
        """What goes with the descriptors."""
        return AtRest(self._room, self._tolerance, self._interval, self._children, self._processes)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


@dataclass(slots=True)
class _Process:
    statm: int
    tasks: int
    threads: int
    resident: int
    """Pages: the fewest that were seen, since what was swapped out or freed may be taken again."""


class WatchedRest:
    """The same, where it is watched."""

    def __init__(self, at_rest: AtRest, descriptors: list[int]) -> None:
        self.step = 0.0
        """Seconds until the next look."""
        self._descriptors = list(descriptors)
        self._room, self._interval = at_rest.room, at_rest.interval
        self._tolerance = min(at_rest.tolerance, at_rest.room // 2)
        files = iter(descriptors)
        contents = iter(at_rest.children)
        self._children = [(next(files), next(contents))]
        self.ran: dict[int, bytes] = {}
        """What the scheduler said of each thread, by the descriptor to read it from."""
        self._processes: list[_Process] = []
        for pages, threads in at_rest.processes:
            self._processes.append(_Process(next(files), next(files), threads, pages))
            for _ in range(threads):
                self.ran[next(files)] = b""
                self._children.append((next(files), next(contents)))
        self._judged = False

    def has_moved(self) -> bool:
        """Whether the job's own runner has to look at it now."""
        try:
            for file, before in self.ran.items():
                if os.pread(file, SCHEDSTAT_BYTES, 0) != before:
                    return self._moves()
        except OSError:  # it has ended
            return True
        return False

    def _moves(self) -> bool:
        """It has run: whether that is of any consequence."""
        if self._room <= 0 and self._judged:
            return True
        self._judged = True
        self.ran = {file: os.pread(file, SCHEDSTAT_BYTES, 0) for file in self.ran}
        grown = self._growth()
        if self._has_started_something() or (self._room > 0 and grown > self._tolerance):
            return True
        self.step = _step_below(min(self._interval, max(STILL_INTERVAL, (self._room - grown) / FASTEST_GROWTH)))
        return False

    def _has_started_something(self) -> bool:
        if any(os.pread(file, 4096, 0) != content for file, content in self._children):
            return True
        return any(os.fstat(process.tasks).st_nlink != process.threads + 2 for process in self._processes)

    def _growth(self) -> int:
        grown = 0
        for process in self._processes:
            resident = int(os.pread(process.statm, 128, 0).split(None, 2)[1])
            process.resident = min(process.resident, resident)
            grown += resident - process.resident
        return grown * _PAGE

    def close(self) -> None:
        """Closes what was handed over."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _step_below(seconds: float) -> float:
    """The shortest step, doubled as often as it fits: of few sizes, so that many jobs are due together."""
    step = min(STILL_INTERVAL, seconds)
    while 2 * step <= seconds:
        step *= 2
    return step
