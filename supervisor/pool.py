"""The slots of the pool: each is a worker forked from here and a runner forked from the warm interpreter.

    supervisor ══ worker ══ runner ══ supervisor        (══ a socket; its end is how each learns of a death)

The pool knows processes only: it starts slots, notices deaths, replaces with a growing pause what dies young, retires
slots that are outdated or too many, and sweeps up processes that a dead runner left to the supervisor. It is given the
function that a forked worker runs. A slot is gone when its worker and its runner are gone and no process below the
supervisor is unaccounted for: only then may its job be given to anyone else.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from supervisor.events import Logger, logger
from supervisor.messages import Channel, ChannelClosed, ChannelFull, ForkRunner, Message, Ping, Retire
from supervisor.processes import clock, descendants, kill_descendants, signal_descendants

YOUNG_SECONDS = 10.0
SETTLED_SECONDS = 1.0
"""A slot that was up for this long works."""
BACKOFF_SECONDS = (0.0, 0.2, 1.0, 5.0, 15.0, 30.0)
MAX_STARTING = 32
MAX_UNSENT = 1000
LINGER_SECONDS = 5.0
"""How long the other half of a slot may take to end by itself."""
PING_SECONDS = 10.0

HANDLED_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1,
)  # fmt: skip
"""What the supervisor acts on, and its forks ignore."""

RunWorker = Callable[[int, Channel, Channel], int]
"""What a forked worker runs: its worker number, and its channels to the supervisor and the runner; the exit code."""


class SlotState(Enum):
    STARTING = "starting"
    IDLE = "idle"
    CLAIMING = "claiming"
    BUSY = "busy"
    RETIRING = "retiring"
    GONE = "gone"


@dataclass(slots=True)
class Child:
    """A process of ours with a channel to it."""

    role: str
    pid: int
    channel: Channel
    started_at: float = field(default_factory=clock)
    heard_at: float = field(default_factory=clock)
    pinged_at: float = 0.0
    alive: bool = True
    unsent: deque[Message] = field(default_factory=deque)
    """What there was no room for: it does not read now. Bounded, since one that never does is ended as hung."""

    def send(self, message: Message, descriptors: Collection[int] = ()) -> bool:
        """Never waits. False when it is gone, or takes nothing more: its end is noticed where it is waited for."""
        if not self.unsent and self._push(message, descriptors):
            return True
        if descriptors or not self.alive or len(self.unsent) >= MAX_UNSENT:
            return False
        self.unsent.append(message)
        return self.flush()

    def offer(self, message: Message) -> bool:
        """The same for what will be said again: without room for it, nothing is kept."""
        return not self.unsent and self._push(message) is True

    def flush(self) -> bool:
        """Sends what waits, as far as there is room; False when it is gone."""
        while self.unsent:
            sent = self._push(self.unsent[0])
            if not sent:
                return sent is not None
            self.unsent.popleft()
        return True

    def _push(self, message: Message, descriptors: Collection[int] = ()) -> bool | None:
        """False without room; None when it is gone."""
        try:
            self.channel.send(message, tuple(descriptors), wait=False)
            return True
        except ChannelClosed:
            return None
        except (ChannelFull, OSError):  # or no memory, or no descriptor, is left for it
            return False

    def is_hung(self, now: float, patience: float) -> bool:
        """Asks now and then; hung is who was asked and has been silent since for longer than `patience`."""
        self.flush()
        if self.pinged_at > self.heard_at and now - self.pinged_at > patience:
            return True
        if self.heard_at >= self.pinged_at and now - max(self.heard_at, self.pinged_at) > PING_SECONDS:
            self.pinged_at = now
            self.offer(Ping())
        return False


@dataclass(slots=True)
class Slot:
    """One place where a job can run."""

    number: int
    worker: Child
    runner: Child
    generation: int
    state: SlotState = SlotState.STARTING
    worker_name: str = ""
    runner_pidfd: int | None = None
    claiming: int | None = None
    """The grant that it is claiming jobs for."""
    grants: set[int] = field(default_factory=set)
    """Grants whose jobs it holds."""
    asks: bool = True
    """Whether it is to look at the queue when it can, beyond what was announced."""
    asks_again: bool = False
    """Whether memory became free here while it was claiming: what did not fit then may fit now."""
    hungry: bool = False
    """Whether its jobs are short and run out."""
    mean_seconds: float = 1.0
    dying_since: float | None = None
    crashed: bool = False
    """Whether it died without having been asked to."""

    def update_state(self) -> None:
        """From what it holds; a slot that starts, retires or is gone stays so."""
        if self.state in (SlotState.IDLE, SlotState.CLAIMING, SlotState.BUSY):
            self.state = (
                SlotState.BUSY if self.grants else SlotState.CLAIMING if self.claiming is not None else SlotState.IDLE
            )


@dataclass(slots=True)
class Backoff:
    """The pause before the next start of something that keeps dying young."""

    failures: int = 0
    not_before: float = 0.0

    def died(self, lived_seconds: float) -> None:
        self.failures = self.failures + 1 if lived_seconds < YOUNG_SECONDS else 1
        self.not_before = clock() + BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]

    def allows(self) -> bool:
        return clock() >= self.not_before


class WorkerPool:
    """The slots, and the processes that they consist of."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        run_worker: RunWorker,
        spared: Callable[[], Collection[int]] = tuple,
        log: Logger | None = None,
    ) -> None:
        self.slots: dict[int, Slot] = {}
        self.desired = 0
        self.generation = 0
        self.restarts: list[str] = []
        self.backoff = Backoff()
        self._selector = selector
        self._run_worker = run_worker
        self._spared = spared
        self._log = log or logger("pool")
        self._others: set[int] = set()
        self._leaving: dict[int, float] = {}
        self._serial = 0

    # -- who is ours --------------------------------------------------------------------------------------------------

    def account_for(self, pid: int) -> None:
        """A child of the supervisor that belongs to no slot: the keeper, the warm interpreter."""
        self._others.add(pid)

    def discharge(self, pid: int) -> None:
        self._others.discard(pid)

    def strays(self) -> list[int]:
        """Processes below the supervisor that are nobody's: what a dead runner left behind."""
        return descendants(os.getpid(), skip=self._known())

    def kill_strays(self) -> bool:
        """Returns whether there were any. Their ends are reaped with everybody else's."""
        known = self._known()
        if not descendants(os.getpid(), skip=known):
            return False
        signal_descendants(os.getpid(), signal.SIGSTOP, skip=known)
        killed = signal_descendants(os.getpid(), signal.SIGKILL, skip=known)
        if killed:
            self._log.warning("strays_killed", count=killed)
        return True

    def kill_everything(self) -> None:
        """At the very end, whatever has not ended by itself."""
        report = kill_descendants(os.getpid(), skip=set(self._spared()))
        if report.killed:
            self._log.error("leftovers_killed", count=report.killed)

    def _known(self) -> set[int]:
        pids = {child.pid for slot in self.slots.values() for child in (slot.worker, slot.runner)}
        return pids | self._others | set(self._leaving) | set(self._spared())

    # -- starting -----------------------------------------------------------------------------------------------------

    def fill(self, warm: Child) -> None:
        """Starts slots until there are as many as desired, not too many at a time."""
        starting = sum(slot.state is SlotState.STARTING for slot in self.slots.values())
        while len(self.slots) < self.desired and starting < MAX_STARTING and self.backoff.allows():
            try:
                self._start_slot(warm)
            except OSError as error:  # no process, descriptor or memory is left: later there may be
                self._log.error("slot_not_started", error=error)
                self.backoff.died(0.0)
            starting += 1

    def _start_slot(self, warm: Child) -> None:
        number = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        self._serial += 1
        to_worker, worker_end = Channel.pair()
        to_runner, runner_end = Channel.pair()
        worker_to_runner, runner_to_worker = Channel.pair()
        serial = self._serial
        pid = fork()
        if pid == 0:
            run_forked(lambda: self._run_worker(serial, worker_end, worker_to_runner), (worker_end, worker_to_runner))
        asked = warm.send(ForkRunner(number), (runner_to_worker.fileno(), runner_end.fileno()))
        for channel in (worker_end, runner_end, worker_to_runner, runner_to_worker):
            channel.close()
        slot = Slot(
            number=number,
            worker=Child("worker", pid, to_worker),
            runner=Child("runner", 0, to_runner, alive=asked),
            generation=self.generation,
        )
        self.slots[number] = slot
        self._selector.register(to_worker.fileno(), selectors.EVENT_READ, ("worker", slot))
        self._selector.register(to_runner.fileno(), selectors.EVENT_READ, ("runner", slot))

    def runner_forked(self, number: int, pid: int) -> None:
        slot = self.slots.get(number)
        if slot is not None and slot.runner.pid == 0:
            slot.runner.pid = pid
            with contextlib.suppress(OSError, AttributeError):
                slot.runner_pidfd = os.pidfd_open(pid)

    # -- ending -------------------------------------------------------------------------------------------------------

    def retire(self, slot: Slot) -> None:
        """Its worker finishes what it is at, and ends; its runner ends with it."""
        slot.state = SlotState.RETIRING
        slot.worker.send(Retire())

    def replace_all(self) -> None:
        """Every slot of now is outdated: each is replaced when it is idle, one at a time."""
        self.generation += 1

    def retire_outdated(self) -> None:
        """Retires an idle slot that is outdated, or one too many."""
        in_motion = [slot for slot in self.slots.values() if slot.state in (SlotState.STARTING, SlotState.RETIRING)]
        surplus = len(self.slots) - self.desired - sum(slot.state is SlotState.RETIRING for slot in in_motion)
        idle = [slot for slot in self.slots.values() if slot.state is SlotState.IDLE]
        for slot in sorted(idle, key=lambda slot: -slot.number)[: max(0, surplus)]:
            self.retire(slot)
            idle.remove(slot)
        outdated = [slot for slot in idle if slot.generation != self.generation]
        if outdated and not in_motion:
            self.retire(outdated[0])

    def worker_died(self, pid: int, exit_code: int) -> bool:
        """False when the process is no worker of the pool."""
        for slot in self.slots.values():
            if slot.worker.pid == pid and slot.worker.alive:
                self._note_death(slot, slot.worker, exit_code)
                return True
        return False

    def runner_gone(self, slot: Slot) -> None:
        self._note_death(slot, slot.runner, None)

    def _note_death(self, slot: Slot, child: Child, exit_code: int | None) -> None:
        if not child.alive:
            return
        child.alive = False
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.channel.fileno())
        if slot.dying_since is None:
            slot.dying_since = clock()
            if slot.state is not SlotState.RETIRING:
                slot.crashed = True
                self._log.warning("slot_lost", slot=slot.number, first=child.role, pid=child.pid, exit_code=exit_code)
                self.restarts.append(f"{child.role}_died")
                self._note_life(slot, clock() - child.started_at)
        if child.role == "worker":
            child.channel.close()  # its runner has seen the worker's end already

    def _note_life(self, slot: Slot, lived_seconds: float) -> None:
        """What dies before or just after it was up will do so again: then the next start waits. What had a job may
        have died of it, which says nothing about the next one."""
        if slot.state is SlotState.STARTING or (not slot.grants and lived_seconds < SETTLED_SECONDS):
            self.backoff.died(lived_seconds)

    def finish_ends(self) -> list[Slot]:
        """The slots that are entirely gone since the last call; helps along those whose other half lingers."""
        gone = []
        for slot in list(self.slots.values()):
            if slot.dying_since is None:
                continue
            if slot.worker.alive or slot.runner.alive or not _has_ended(slot.runner_pidfd):
                self._help_along(slot)
            elif not self.kill_strays():
                self._forget(slot)
                gone.append(slot)
        return gone

    def _help_along(self, slot: Slot) -> None:
        assert slot.dying_since is not None
        if clock() - slot.dying_since < LINGER_SECONDS:
            return
        if slot.worker.alive:
            self.kill(slot.worker, "lingered")
        self.kill_runner(slot)

    def kill(self, child: Child, reason: str) -> None:
        """Ends a child of ours at once. It has not been reaped, so its id is still its own."""
        self._log.error("process_killed", role=child.role, pid=child.pid, reason=reason)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)

    def kill_runner(self, slot: Slot, reason: str = "lingered") -> None:
        if slot.runner.alive:
            self._log.error("process_killed", role="runner", pid=slot.runner.pid, reason=reason)
        if slot.runner_pidfd is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(slot.runner_pidfd, signal.SIGKILL)

    def _forget(self, slot: Slot) -> None:
        slot.state = SlotState.GONE
        slot.runner.channel.close()
        now = clock()
        self._leaving = {pid: since for pid, since in self._leaving.items() if now - since < LINGER_SECONDS}
        self._leaving[slot.runner.pid] = now  # its socket closes a moment before it is gone
        if slot.runner_pidfd is not None:
            os.close(slot.runner_pidfd)
        del self.slots[slot.number]

    def look_for_hung(self, patience: float) -> None:
        """Ends what has not answered for `patience` seconds: it is stopped, or stuck."""
        now = clock()
        for slot in self.slots.values():
            if slot.worker.alive and slot.worker.is_hung(now, patience):
                self.restarts.append("worker_hung")
                self.kill(slot.worker, "no sign of life")
                slot.worker.pinged_at = now
            if slot.runner.alive and slot.runner.pid and slot.runner.is_hung(now, patience):
                self.restarts.append("runner_hung")
                self.kill_runner(slot, "no sign of life")
                slot.runner.pinged_at = now


def _has_ended(pidfd: int | None) -> bool:
    """A process closes its sockets before its children go to another parent; only then it has ended."""
    if pidfd is None:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def fork() -> int:
    """A fork that no signal meets: the child would put it into the pipe of its parent, who would count it twice."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def run_forked(run: Callable[[], int], channels: Collection[Channel], keep: Collection[int] = ()) -> None:
    """In a forked child: becomes the new process. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        close_descriptors_except({0, 1, 2, *keep, *(channel.fileno() for channel in channels)})
        code = run()
    except BaseException as error:
        logger("pool").error("process_failed", pid=os.getpid(), error=error)
    finally:
        os._exit(code)


def close_descriptors_except(kept: Collection[int]) -> None:
    """Closes every other open descriptor of this process."""
    try:
        opened = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        opened = list(range(os.sysconf("SC_OPEN_MAX")))
    for descriptor in opened:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
