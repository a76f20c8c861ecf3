"""What processes cost: CPU time and memory, from /proc.

What a process itself has used comes from the scheduler, in nanoseconds: where the kernel counts by its ticks, as here,
who wakes up with them for some microseconds is charged whole ones. Of children that have ended only ticks are known.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from supervisor.processes import descendants

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds of CPU time of a process, and of the children that it has waited for."""

    own: float
    children: float

    def __sub__(self, other: CpuTime) -> CpuTime:
        return CpuTime(self.own - other.own, self.children - other.children)


def cpu_time(pid: int) -> CpuTime:
    """Nothing for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return CpuTime(0.0, 0.0)
    user, system, children_user, children_system = map(int, text.rpartition(")")[2].split()[11:15])
    own = _scheduled_seconds(pid)
    ticked = (user + system) / _TICKS_PER_SECOND
    return CpuTime(own or ticked, (children_user + children_system) / _TICKS_PER_SECOND)


def _scheduled_seconds(pid: int) -> float:
    """Of all threads that live; 0 where the scheduler does not tell."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


def total_cpu_seconds(pids: Iterable[int]) -> float:
    times = [cpu_time(pid) for pid in pids]
    return sum(time.own + time.children for time in times)


def total_pss_mb(pids: Iterable[int]) -> float:
    """Proportional set size: shared pages are divided among those who share them."""
    return sum(_pss_kb(pid) for pid in pids) / 1024


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def tree(*roots: int) -> list[int]:
    """These processes and everything below them."""
    return [pid for root in roots for pid in (root, *descendants(root))]
