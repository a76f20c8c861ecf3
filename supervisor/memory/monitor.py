"""Watches one job's memory and says when it is above its limit. Kills nobody, waits for nothing.

The runner's loop calls `look` when `next_look` has come: far from the limit every `interval` seconds, near
it every 2 ms (8 while it does not grow), so that a job which allocates at full speed is seen before it got
far. While the cheap upper bound is within the limit, that is all. Above it, what is certain to be the job's
own decides at once, and an exact reading decides what is in doubt (pages shared between processes or with the
runner). A job is never reported by an estimate, and one of several processes only by a reading while they
were stopped. What does not move is `at_rest`, and can be watched at a lower price.

Two sums bracket what is charged: the *floor* counts what must be the job's own, the *estimate* adds to the
last exact reading whatever has grown since. Writing to a shared page changes neither, only page faults hint at
it; so above the limit the exact reading is repeated, at up to 5 % of the time, or 20 % while it keeps finding
more. If the runner dies, so does the job.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from supervisor.memory.rest import FASTEST_GROWTH, STILL_INTERVAL, Rest
from supervisor.memory.usage import CheapReading, ProcessUsage, tree_usage
from supervisor.processes import (
    ProcessStat,
    await_stopped,
    children,
    command_line,
    descendants,
    process_stat,
    signal_descendants,
    stop_descendants,
)

MB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
_MIN_INTERVAL = 0.002
_STILL_LOOKS = 8
_DISCOVERY_INTERVAL = 0.010
_SWAP_INTERVAL = 1.0
_BUSY_SHARE = 20
"""Cheap work may take one part in this many of the time, and exact readings above the limit too."""
_MOST_BUSY_SHARE = 4
"""For exact readings while pages that were shared are being written."""
_EXACT_SECONDS_PER_BYTE = 17e-6 / MB
_EXACT_SECONDS_PER_PROCESS = 100e-6
_SOME, _MANY = 8, 64
"""More processes than some that multiply, or more than many, are read exactly only while they are stopped."""
_STOP_SECONDS = 1.0
_MAX_POINTS = 64
_MAX_SHARES = 20
_MAX_COMMAND = 200


def _counter_error() -> int:
    """Bytes by which a process's cheap counters may be wrong: each CPU adds to them in batches."""
    cpus = os.cpu_count() or 1
    return cpus * max(32, 2 * cpus) * PAGE


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """What one process of a job is charged, in bytes."""

    pid: int
    command: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Overrun:
    """The job is charged `used` bytes, more than its `limit`. `processes`: the largest of its `count` first, at most
    20."""

    used: int
    limit: int
    processes: tuple[ProcessShare, ...]
    count: int


class _Member(CheapReading):
    """A process of the job, and what is known of its memory.

    `baseline`: its total when the last exact reading counted it, or what it is taken to have been born with.
    `uncharged`: bytes that are not its own; None while unknown, then nothing of it is certain.
    `settled_shared`: its shared memory at the exact reading; what was charged of it is `charged_shared`.
    `faults`: how many page faults it had when it was discovered last, `settled_faults` at the exact reading.
    """

    __slots__ = (
        "baseline",
        "charged_shared",
        "faults",
        "image",
        "settled_faults",
        "settled_shared",
        "started",
        "uncharged",
    )

    def __init__(self, process: ProcessStat) -> None:
        super().__init__(process.pid)
        self.started = process.started
        self.image = process.image
        self.faults = self.settled_faults = process.page_faults
        self.baseline = 0
        self.uncharged: int | None = None
        self.settled_shared = -1
        self.charged_shared = 0

    @property
    def growth(self) -> int:
        return max(0, self.total - self.baseline)

    @property
    def unshared(self) -> int:
        """Bytes that may have become its own by writing to pages it shared: what faults did not make it grow."""
        written = (self.faults - self.settled_faults) * PAGE - self.growth
        return max(0, min(written, self.uncharged or 0))

    @property
    def is_settled(self) -> bool:
        """Whether it has had no page since the exact reading."""
        return self.uncharged is not None and self.faults == self.settled_faults

    @property
    def certain(self) -> int:
        """What is charged for its private memory at least."""
        return 0 if self.uncharged is None else max(0, self.anonymous - self.uncharged)

    @property
    def certain_shared(self) -> int:
        """Its part of shared memory at the last exact reading; 0 when that has changed."""
        known = self.uncharged is not None and self.shared == self.settled_shared
        return self.charged_shared if known else 0


class MemoryMonitor:
    """Memory of the job under one runner: its every descendant without those in `skip` *is* the job.

    `limit` is in bytes, `interval` the longest time in seconds between two looks. Forks of the runner and
    programs that were executed are told apart by themselves. `used` is the last reading, `peak` the highest
    that was surely charged. `skip` may be replaced at any time. Close it when the job has ended.
    """

    def __init__(
        self,
        runner_pid: int,
        limit: int,
        *,
        interval: float,
        skip: Collection[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.skip = skip
        self.used = 0
        self._runner_pid = runner_pid
        runner = process_stat(runner_pid)
        self._runner_image = runner.image if runner is not None else None
        self._interval = interval
        self._clock = clock
        self._started = clock()
        self._runner = CheapReading(runner_pid)
        self._members: dict[int, _Member] = {}
        self._next_discovery = self._started
        self._exact: int | None = None
        self._exact_ceiling = 0
        self._exact_at = self._started
        self._exact_slowness = 1.0
        self._false_alarms = 0
        self._certain_peak = 0
        self._estimated_peak = 0
        self._counter_error = _counter_error()
        self._looked_used = self._still = self._newcomers = 0
        self._history = _History()
        self.next_look = self._started + self._delay(0)

    def close(self) -> None:
        for member in self._members.values():
            member.close()
        self._members.clear()
        self._runner.close()

    @property
    def peak(self) -> int:
        """Bytes: the most that was surely charged, or an estimate while nothing is known for sure."""
        return self._certain_peak if self._exact is not None else max(self._certain_peak, self._estimated_peak)

    def series(self) -> list[tuple[float, int]]:
        """At most 64 points (seconds since start, bytes), oldest first, among them the peak and the last."""
        return [(seconds, min(used, self.peak)) for seconds, used in self._history.points()]

    def look(self, now: float) -> Overrun | None:
        """Read the job's memory; an `Overrun` when it is above the limit. `now` is the clock's value."""
        before = self._clock()
        self._refresh(now)
        floor, ceiling = self._floor(), self._ceiling()
        overrun, confirmed = None, False
        if floor > self.limit + self._counter_error * len(self._members):
            overrun = self._overrun(
                floor, {pid: member.certain + member.certain_shared for pid, member in self._members.items()}
            )
        elif self._in_doubt(floor, ceiling, now):
            confirmed = self._is_teeming()
            overrun = self._read_stopped() if confirmed else self._read_exactly()
            floor, ceiling = self._floor(), self._ceiling()
        if overrun is not None and len(self._members) > 1 and not confirmed:
            overrun = self._read_stopped()
            # A program that is just being started may still look as large as its parent: the exact reading knows.
            floor, ceiling = min(self._floor(), self._exact or 0), self._ceiling()
        self._record(now, floor, ceiling, overrun)
        after = self._clock()
        busy = (after - before) * _BUSY_SHARE if self._exact_at < before else 0.0
        self.next_look = after + max(self._delay(self.used), min(busy, self._interval))
        return overrun

    def at_rest(self) -> Rest | None:
        """What to watch in this monitor's place after its last look; None while the job grows, or where it is much."""
        if self._still < _STILL_LOOKS or not self._members:
            return None
        room = self.limit - self._ceiling() - self._counter_error * len(self._members)
        if room <= 0 and not all(member.is_settled for member in self._members.values()):
            return None
        return Rest.of_tree(
            self._runner_pid,
            {pid: member.resident for pid, member in self._members.items()},
            room=room,
            tolerance=max(MB, self.limit // 64),
            interval=self._interval,
        )

    def _read_stopped(self) -> Overrun | None:
        """Processes that come to share pages while one is read after the other have them counted twice. So they are
        stopped, and read once more; without an overrun they go on.

        Of many, some are always about to fork. Who does keeps a reader waiting, for seconds when all want the
        processor: only those that have stopped are read.
        """
        asked = stop_descendants(self._runner_pid, self.skip)
        overrun = self._read_exactly(await_stopped(asked, _STOP_SECONDS) if self._is_teeming() else None)
        if overrun is None:
            signal_descendants(self._runner_pid, signal.SIGCONT, self.skip)
        return overrun

    def _is_teeming(self) -> bool:
        """Whether the job has very many processes, or is about to."""
        count = len(self._members)
        return count > _MANY or (count > _SOME and self._newcomers > _SOME // 2)

    def _delay(self, used: int) -> float:
        until_limit = (self.limit - used) / FASTEST_GROWTH
        self._still = 0 if used > self._looked_used else min(self._still + 1, _STILL_LOOKS)
        self._looked_used = used
        shortest = min(_MIN_INTERVAL * (1 + self._still // 2), STILL_INTERVAL)
        return min(self._interval, max(shortest, until_limit))

    # -- who belongs to the job

    def _refresh(self, now: float) -> None:
        gone = [pid for pid, member in self._members.items() if not member.refresh(now, _SWAP_INTERVAL)]
        for pid in gone:
            self._members.pop(pid).close()
        if now >= self._next_discovery:
            before = self._clock()
            self._discover(now, again=self._ceiling() > self.limit)
            cost = self._clock() - before
            self._next_discovery = now + max(_DISCOVERY_INTERVAL, cost * _BUSY_SHARE)

    def _discover(self, now: float, *, again: bool) -> None:
        """Meet new processes; with `again` the known ones too, which may have executed another program."""
        living = descendants(self._runner_pid, self.skip, self._children_of)
        for pid in self._members.keys() - set(living):
            self._members.pop(pid).close()
        self._newcomers = len(living) - len(self._members)
        for pid in living:
            if again or pid not in self._members:
                self._meet(pid, now)

    def _children_of(self, pid: int) -> list[int]:
        reading = self._runner if pid == self._runner_pid else self._members.get(pid)
        return children(pid) if reading is None else reading.children()

    def _meet(self, pid: int, now: float) -> None:
        process = process_stat(pid)
        if process is None or process.ended:
            return
        known = self._members.get(pid)
        if known is not None:
            if (known.started, known.image) == (process.started, process.image):
                known.faults = process.page_faults
                return
            self._members.pop(pid).close()  # it executed another program: all its memory is new
        parent = self._members.get(process.parent)
        if parent is not None and parent.image != process.image:
            self._meet(process.parent, now)  # it may have executed this program since, or have been just about to
        try:
            member = _Member(process)
        except OSError:
            return
        if not member.refresh(now, 0.0):
            member.close()
            return
        member.baseline, member.uncharged = self._heritage(member, process.parent, now)
        self._members[pid] = member

    def _heritage(self, member: _Member, parent_pid: int, now: float) -> tuple[int, int | None]:
        """What a new process has from its parent at most; and what it is not charged, if that is known."""
        of_runner = member.image == self._runner_image
        if member.image is None or not (of_runner or self._has_relative(member)):
            return 0, 0
        parent = self._members.get(parent_pid)
        if parent is not None and parent.image == member.image:
            return min(member.total, parent.total), None
        if of_runner:
            self._runner.refresh(now, _SWAP_INTERVAL)
            return min(member.total, self._runner.total), None
        return 0, None

    def _has_relative(self, member: _Member) -> bool:
        return any(one.image == member.image for one in self._members.values())

    # -- how much it is

    def _ceiling(self) -> int:
        return sum(member.total for member in self._members.values())

    def _floor(self) -> int:
        """Of shared memory only the largest share is certain: others may have mapped the same since."""
        members = self._members.values()
        return sum(member.certain for member in members) + max((member.certain_shared for member in members), default=0)

    def _estimate(self, ceiling: int) -> int:
        return min(ceiling, (self._exact or 0) + sum(member.growth for member in self._members.values()))

    def _in_doubt(self, floor: int, ceiling: int, now: float) -> bool:
        """Whether an exact reading is worth its price now."""
        estimate = self._estimate(ceiling)
        waited = (now - self._exact_at) / self._exact_cost(ceiling)
        if ceiling + self._counter_error * len(self._members) <= self.limit:
            doubt = (ceiling if self._exact is None else estimate) - floor
            return doubt > max(MB, self.limit // 64) and waited >= 5 * _BUSY_SHARE
        if ceiling - floor <= self._counter_error and floor <= self.limit:
            return False  # all of it is certain, and within the limit
        step = self.limit // 256  # a job that trembles at its limit is not read at every look
        exact = self._exact or 0
        if estimate > self.limit and estimate - exact >= step:
            return True
        unshared = sum(member.unshared for member in self._members.values())
        if min(ceiling, estimate + unshared) > self.limit and waited >= _MOST_BUSY_SHARE << self._false_alarms:
            return True
        grown = ceiling - self._exact_ceiling
        half_way = (self.limit - exact) // 2
        return waited >= _BUSY_SHARE or grown >= max(half_way, self._exact_ceiling // 4, step)

    def _exact_cost(self, ceiling: int) -> float:
        reckoned = ceiling * _EXACT_SECONDS_PER_BYTE + (len(self._members) + 1) * _EXACT_SECONDS_PER_PROCESS
        return reckoned * self._exact_slowness

    def _read_exactly(self, among: set[int] | None = None) -> Overrun | None:
        before = self._clock()
        self._discover(before, again=True)
        expected = self._exact_cost(self._ceiling()) / self._exact_slowness
        self._exact_ceiling = self._ceiling()
        pids = sorted(self._members, key=lambda pid: self._members[pid].total, reverse=True)
        if among is not None:
            pids = [pid for pid in pids if pid in among]
        usages = tree_usage(self._runner_pid, pids=pids, enough=self.limit)
        if len(pids) > 1 and _charged(usages) <= self.limit:
            # Whose pages are being mapped by others just now are counted twice, in one order more than in the other.
            usages = min(usages, tree_usage(self._runner_pid, pids=pids[::-1]), key=_charged)
        for pid, member in self._members.items():
            usage = usages.get(pid)
            shared_before = member.shared
            if usage is None:  # borrows its parent's memory, or has just ended
                member.baseline, member.uncharged = member.total, None
                continue
            member.refresh(before, 0.0)
            member.baseline = usage.anonymous + usage.uncharged + shared_before
            member.uncharged = usage.uncharged
            member.settled_shared = member.shared if member.shared == shared_before else -1
            member.charged_shared = usage.shared
            member.settled_faults = member.faults
        charged = {pid: usage.charged for pid, usage in usages.items()}
        exact = sum(charged.values())
        found_more = exact - (self._exact or 0) > self.limit // 256
        self._false_alarms = 0 if found_more else min(self._false_alarms + 1, 3)
        self._exact = exact
        self._exact_at = self._clock()
        self._exact_slowness = min(10.0, max(0.1, (self._exact_at - before) / expected))
        return self._overrun(self._exact, charged) if self._exact > self.limit else None

    # -- what is told

    def _overrun(self, used: int, charged: dict[int, int]) -> Overrun:
        largest = sorted(charged.items(), key=lambda item: item[1], reverse=True)[:_MAX_SHARES]
        shares = tuple(ProcessShare(pid, _command(pid), share) for pid, share in largest)
        return Overrun(used, self.limit, shares, len(self._members))

    def _record(self, now: float, floor: int, ceiling: int, overrun: Overrun | None) -> None:
        estimate = self._estimate(ceiling)
        self.used = overrun.used if overrun is not None else estimate
        exceeded = overrun.used if overrun is not None else 0
        self._certain_peak = max(self._certain_peak, floor, self._exact or 0, exceeded)
        if self._exact is None:
            grown = sum(max(0, member.anonymous - member.baseline) for member in self._members.values())
            shared = max((member.shared for member in self._members.values()), default=0)
            self._estimated_peak = max(self._estimated_peak, min(ceiling, grown + shared))
        self._history.add(max(0.0, now - self._started), self.used)


def _charged(usages: Mapping[int, ProcessUsage]) -> int:
    return sum(usage.charged for usage in usages.values())


class _History:
    """A bounded record of a growing series: when it is full, every second point goes and the step doubles."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int]] = []
        self._step = 0.01
        self._peak = (0.0, -1)
        self._last = (0.0, 0)

    def add(self, seconds: float, value: int) -> None:
        self._last = (seconds, value)
        if value > self._peak[1]:
            self._peak = self._last
        if self._kept and seconds - self._kept[-1][0] < self._step:
            return
        self._kept.append(self._last)
        if len(self._kept) > _MAX_POINTS - 2:
            self._kept = self._kept[::2]
            self._step *= 2

    def points(self) -> list[tuple[float, int]]:
        return sorted({*self._kept, self._peak, self._last}) if self._kept else []


def _command(pid: int) -> str:
    """The command line of a process, shortened; empty when it is gone."""
    return command_line(pid)[:_MAX_COMMAND]
