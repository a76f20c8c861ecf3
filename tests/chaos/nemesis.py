"""Breaks things, by a schedule that follows from the seed alone, and mends them after a while.

What a fault hits is chosen among what is there at that moment (the third worker, the primary), so that the same seed
makes the same faults in the same order, on processes that differ.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread

from supervisor.processes import process_stat
from tests.chaos.cluster import Cluster, Host

Undo = Callable[[], bool | None]
"""Mends a fault; True: not yet possible, to be called again."""

WEIGHTS = {
    "kill_worker": 6,
    "kill_runner": 6,
    "kill_keeper": 3,
    "kill_warm": 3,
    "kill_supervisor": 6,
    "kill_everything": 3,
    "stop_worker": 5,
    "stop_runner": 3,
    "stop_keeper": 3,
    "stop_warm": 2,
    "stop_supervisor": 5,
    "stop_everything": 3,
    "drain": 2,
    "reload": 1,
    "kill_mongod": 2,
    "stop_mongod": 3,
    "stop_majority": 1,
    "step_down": 3,
    "cut": 5,
    "cut_from_one": 3,
    "delay": 3,
    "reset": 3,
    "fill_disk": 2,
    "cut_with_full_disk": 2,
    "step_clock": 3,
}
DRAIN_SECONDS = 90.0
"""A drain may have to wait for a worker that is stopped, and for MongoDB."""
MEND_AGAIN_SECONDS = 0.2
THAW_SECONDS = 0.2
SUPERVISOR = {"kill_supervisor", "kill_everything", "stop_supervisor", "stop_everything", "drain", "stop_runner"}
"""Who stops a runner takes its job's last guard but one: the supervisor. Both at once is beyond what is promised."""
NETWORK = {"cut", "cut_from_one", "delay", "reset", "cut_with_full_disk"}
DISK = {"fill_disk", "cut_with_full_disk"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of the schedule. `pick` decides among the candidates."""

    at: float
    name: str
    host: int
    seconds: float
    pick: int

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.name} on {self.host} for {self.seconds:.1f} s"


def schedule(
    seed: int,
    seconds: float,
    hosts: int,
    *,
    per_second: float,
    longest_seconds: Sequence[float],
    names: Sequence[str],
) -> list[Fault]:
    """The faults of a run; each lasts at most one of `longest_seconds`."""
    generator = random.Random(f"nemesis {seed}")
    weights = [WEIGHTS[name] for name in names]
    faults = []
    at = 1.0
    while names and at < seconds:
        faults.append(
            Fault(
                at=round(at, 2),
                name=generator.choices(list(names), weights)[0],
                host=generator.randrange(hosts),
                seconds=round(generator.uniform(0.1, generator.choice(longest_seconds)), 2),
                pick=generator.randrange(1000),
            )
        )
        at += generator.expovariate(per_second)
    return faults


class Nemesis:
    """Executes a schedule against a cluster. What it stops or kills it also continues or restarts."""

    def __init__(self, cluster: Cluster, faults: Sequence[Fault], say: Callable[[str], None]) -> None:
        self.done: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.exits: list[str] = []
        self._cluster = cluster
        self._faults = list(faults)
        self._say = say
        self._mending: list[tuple[float, int, str, Undo]] = []
        self._serial = itertools.count()
        self._busy: set[str] = set()

    def run(self, seconds: float) -> None:
        """Takes as long as it was told to, then mends everything."""
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            while self._faults and self._faults[0].at <= now:
                self._commit(self._faults.pop(0), now)
            while self._mending and self._mending[0][0] <= now:
                self._mend()
            self.look_after_supervisors()
            time.sleep(0.02)
        while self._mending:
            self._mend()
            time.sleep(0.02)
        for name, count in self.skipped.items():
            self._say(f"{name}: {count} times there was nothing to hit, or it was hit already")

    def look_after_supervisors(self) -> None:
        """A supervisor that ended without being asked to is a failure; it is restarted for the run to go on."""
        for host in self._cluster.hosts:
            if f"supervisor {host.number}" not in self._busy and not host.is_running:
                self.exits.append(f"supervisor {host.number} ended with {host.exit_code}: {host.last_words()}")
                host.start(ready=False)

    def _commit(self, fault: Fault, now: float) -> None:
        host = self._cluster.hosts[fault.host]
        target = self._target(fault, host)
        if target in self._busy:
            self.skipped[fault.name] += 1
            return
        undo = getattr(self, fault.name)(host, fault)
        if undo is None:
            self.skipped[fault.name] += 1
            return
        self.done[fault.name] += 1
        self._say(str(fault))
        self._busy.add(target)
        heapq.heappush(self._mending, (now + fault.seconds, next(self._serial), target, undo))

    def _target(self, fault: Fault, host: Host) -> str:
        """What a fault occupies while it lasts."""
        if fault.name in SUPERVISOR:
            return f"supervisor {host.number}"
        if fault.name in NETWORK:
            return f"network {host.number}"
        if fault.name in DISK:
            return f"disk {host.number}"
        if "mongod" in fault.name or fault.name in ("stop_majority", "step_down"):
            return "replica set"
        return f"{fault.name} {host.number} {fault.pick}"

    def _mend(self) -> None:
        at, _, target, undo = heapq.heappop(self._mending)
        if undo():
            heapq.heappush(self._mending, (at + MEND_AGAIN_SECONDS, next(self._serial), target, undo))
        else:
            self._busy.discard(target)

    # -- processes ----------------------------------------------------------------------------------------------------

    def kill_worker(self, host: Host, fault: Fault) -> Undo | None:
        return _send(signal.SIGKILL, host.workers(), fault)

    def kill_runner(self, host: Host, fault: Fault) -> Undo | None:
        return _send(signal.SIGKILL, host.runners(), fault)

    def kill_keeper(self, host: Host, fault: Fault) -> Undo | None:
        return _send(signal.SIGKILL, host.keepers(), fault)

    def kill_warm(self, host: Host, fault: Fault) -> Undo | None:
        return _send(signal.SIGKILL, host.warm_interpreters(), fault)

    def stop_worker(self, host: Host, fault: Fault) -> Undo | None:
        return _pause(host.workers(), fault)

    def stop_runner(self, host: Host, fault: Fault) -> Undo | None:
        return _pause(host.runners(), fault)

    def stop_keeper(self, host: Host, fault: Fault) -> Undo | None:
        return _pause(host.keepers(), fault)

    def stop_warm(self, host: Host, fault: Fault) -> Undo | None:
        return _pause(host.warm_interpreters(), fault)

    # -- supervisors --------------------------------------------------------------------------------------------------

    def kill_supervisor(self, host: Host, fault: Fault) -> Undo:
        host.kill()
        return lambda: _restart(host)

    def kill_everything(self, host: Host, fault: Fault) -> Undo:
        """All of ours at once, the jobs not: nobody is left to end them before the next supervisor."""
        pids = [*host.workers(), *host.keepers(), *host.warm_interpreters(), *host.runners()]
        random.Random(fault.pick).shuffle(pids)
        for pid in [host.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        host.wait()
        return lambda: _restart(host)

    def stop_supervisor(self, host: Host, fault: Fault) -> Undo | None:
        return _pause([host.pid], fault)

    def stop_everything(self, host: Host, fault: Fault) -> Undo | None:
        """As a suspended host. When it wakes up, a job may get a turn before its runner has looked at the clock: no
        user process can prevent that, so that ours are continued first here."""
        ours = [host.pid, *host.warm_interpreters(), *host.keepers(), *host.workers(), *host.runners()]
        continue_ours, continue_jobs = _pause_all(ours), _pause_all([pid for pid in host.tree() if pid not in ours])

        def undo() -> None:
            if continue_ours is not None:
                continue_ours()
                time.sleep(THAW_SECONDS)
            if continue_jobs is not None:
                continue_jobs()

        return undo

    def drain(self, host: Host, fault: Fault) -> Undo | None:
        if not host.workers():
            return None  # a signal that comes before its handler ends the process, as it would any other
        host.signal(signal.SIGTERM if fault.pick % 2 else signal.SIGQUIT)
        give_up = time.monotonic() + DRAIN_SECONDS

        def restart() -> bool:
            if host.is_running and time.monotonic() < give_up:
                return True
            if host.exit_code != 0:
                how = "did not end" if host.is_running else f"exited with {host.exit_code}"
                self.exits.append(f"supervisor {host.number} was drained and {how}: {host.last_words()}")
                host.kill()
            host.start(ready=False)
            return False

        return restart

    def reload(self, host: Host, fault: Fault) -> Undo | None:
        if not host.workers():
            return None
        host.signal(signal.SIGHUP)
        return _nothing

    # -- MongoDB ------------------------------------------------------------------------------------------------------

    def kill_mongod(self, host: Host, fault: Fault) -> Undo:
        member = self._member(fault)
        self._cluster.replica_set.kill_member(member)
        return lambda: self._cluster.replica_set.start_member(member)

    def stop_mongod(self, host: Host, fault: Fault) -> Undo:
        return self._stop_members([self._member(fault)])

    def stop_majority(self, host: Host, fault: Fault) -> Undo:
        return self._stop_members([fault.pick % 3, (fault.pick + 1) % 3])

    def step_down(self, host: Host, fault: Fault) -> Undo:
        def step_down() -> None:
            with contextlib.suppress(Exception):  # it may have resigned by itself meanwhile
                self._cluster.replica_set.step_down(3)

        Thread(target=step_down, daemon=True).start()
        return _nothing

    def _member(self, fault: Fault) -> int:
        """The primary every other time."""
        return self._cluster.replica_set.primary_or(fault.pick % 3) if fault.pick % 2 else fault.pick % 3

    def _stop_members(self, members: list[int]) -> Undo:
        replica_set = self._cluster.replica_set
        for member in members:
            replica_set.pause_member(member)

        def undo() -> None:
            for member in members:
                replica_set.resume_member(member)

        return undo

    # -- network, disk, clock -----------------------------------------------------------------------------------------

    def cut(self, host: Host, fault: Fault) -> Undo:
        return self._change_links(host, range(3), whole=False)

    def cut_from_one(self, host: Host, fault: Fault) -> Undo:
        return self._change_links(host, [self._member(fault)], whole=False)

    def delay(self, host: Host, fault: Fault) -> Undo:
        return self._change_links(host, range(3), delay_seconds=0.01 + fault.pick / 2000)

    def reset(self, host: Host, fault: Fault) -> Undo:
        for link in host.links:
            self._cluster.network.do(link.reset())
        return _nothing

    def _change_links(
        self, host: Host, members: Sequence[int], *, whole: bool = True, delay_seconds: float = 0.0
    ) -> Undo:
        links = [host.links[member] for member in members]
        for link in links:
            self._cluster.network.do(link.set(whole=whole, delay_seconds=delay_seconds))

        def undo() -> None:
            for link in links:
                self._cluster.network.do(link.set())

        return undo

    def fill_disk(self, host: Host, fault: Fault) -> Undo:
        host.fill_disk()
        return host.free_disk

    def cut_with_full_disk(self, host: Host, fault: Fault) -> Undo:
        """Results can neither be written nor kept: they are lost, but nothing else is."""
        host.fill_disk()
        mend = self.cut(host, fault)

        def undo() -> bool | None:
            host.free_disk()
            return mend()

        return undo

    def step_clock(self, host: Host, fault: Fault) -> Undo | None:
        if not host.has_own_clock:
            return None
        host.set_clock((fault.pick - 500) * 30)
        return lambda: host.set_clock(0)


def _nothing() -> None:
    """A fault that is over at once."""


def _restart(host: Host) -> None:
    if not host.is_running:
        host.start(ready=False)


def _chosen(pids: Sequence[int], fault: Fault) -> int | None:
    return sorted(pids)[fault.pick % len(pids)] if pids else None


def _send(number: signal.Signals, pids: Sequence[int], fault: Fault) -> Undo | None:
    pid = _chosen(pids, fault)
    if pid is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return _nothing


def _pause(pids: Sequence[int], fault: Fault) -> Undo | None:
    pid = _chosen(pids, fault)
    return None if pid is None else _pause_all([pid])


def _pause_all(pids: Sequence[int]) -> Undo | None:
    """Stops processes; the undo continues the very same ones."""
    stopped = []
    for pid in pids:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            stopped.append(pidfd)
            if process_stat(pid) is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)

    def undo() -> None:
        for pidfd in stopped:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

    return undo if stopped else None
