"""The supervisor: one thread, no database, no user code, so nothing can make it hang.

It compares what is with what ought to be, turn after turn: workers, keeper, lookout and warm interpreter are started
and replaced; idle workers are granted claims as far as the memory budget goes; running jobs are stopped when they are
cancelled, lose their lease, or outlive a shutdown. Everything arrives at one selector: signals, the channels of its
children, and their deaths. When the supervisor dies, every socket to it closes, and everything below it ends.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import IntEnum

from supervisor.claims import Claims
from supervisor.errors import ConfigurationError
from supervisor.events import Logger, logger
from supervisor.job import lease_margin
from supervisor.memory.budget import Budget
from supervisor.memory.host import default_budget_mb, pressure
from supervisor.messages import (
    Beat,
    CancelRequested,
    Channel,
    ChannelClosed,
    Claimed,
    ClaimedJob,
    Extend,
    Finished,
    FinishedJob,
    GiveBack,
    Hungry,
    KeeperReady,
    LeasesLost,
    Message,
    NothingDue,
    Operation,
    Pong,
    PreloadChanged,
    Preloading,
    QueueHead,
    Released,
    Renewed,
    Retire,
    RunnerForked,
    RunningJob,
    Stop,
    StoreState,
    Usage,
    Wake,
    WarmReady,
    WorkerLost,
    WorkerReady,
)
from supervisor.pool import Backoff, Child, RunWorker, Slot, SlotState, WorkerPool, fork, run_forked
from supervisor.processes import become_subreaper, clock, reap
from supervisor.settings import Settings
from supervisor.states import Ending
from supervisor.systemd import notify

TICK_SECONDS = 1.0
BEAT_SECONDS = 0.1
"""So long news wait for the keeper to hear them together: telling it takes it 1 ms, just when a job starts."""
SWEEP_SECONDS = 0.01
PRELOAD_SECONDS = 600.0
"""How long the warm interpreter may take to import what it is to preload."""
STOP_SECONDS = 15.0
"""What workers and the keeper get to write their last words once no job is left."""


class Phase(IntEnum):
    """The life of a supervisor; it only goes forward."""

    RUNNING = 0
    DRAINING = 1
    STOPPING = 2
    STOPPED = 3


@dataclass(slots=True)
class Held:
    """A job that a worker of ours has locked and whose outcome is not written yet."""

    job: ClaimedJob
    slot: Slot
    grant: int
    used_mb: int = 0
    deadline: float = 0.0


@dataclass(slots=True)
class News:
    """What happened since the last beat."""

    claimed: list[ClaimedJob] = field(default_factory=list)
    finished: list[FinishedJob] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.claimed or self.finished or self.operations)


class Supervisor:
    """The main loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        run_worker: RunWorker,
        run_keeper: Callable[[Channel], int],
        run_lookout: Callable[[Channel], int],
        start_warm: Callable[[Settings, Collection[str]], Child],
        reload: Callable[[], Settings],
        spared: Callable[[], Collection[int]] = tuple,
        keeper_descriptors: Collection[int] = (),
        lookout_descriptors: Collection[int] = (),
        log: Logger | None = None,
    ) -> None:
        self.phase = Phase.RUNNING
        self._settings = settings
        self._log = log or logger("supervisor")
        self._selector = selectors.DefaultSelector()
        self._pool = WorkerPool(self._selector, run_worker=run_worker, spared=spared)
        self._pool.desired = settings.workers
        self._default_budget_mb = default_budget_mb()  # of the start: later, running jobs use some of it
        self._budget = Budget(settings.memory_budget or self._default_budget_mb)
        self._claims = Claims(self._pool, self._budget)
        self._run_keeper = run_keeper
        self._start_warm = start_warm
        self._reload = reload
        self._keeper_descriptors = keeper_descriptors
        self._run_lookout = run_lookout
        self._lookout_descriptors = lookout_descriptors
        self._keeper: Child | None = None
        self._keeper_backoff = Backoff()
        self._keeper_ready = False
        self._lookout: Child | None = None
        self._lookout_backoff = Backoff()
        self._warm: Child | None = None
        self._warm_backoff = Backoff()
        self._warm_ready = False
        self._warm_problems: list[str] = []
        self._preloading: str | None = None
        self._fatal_modules: set[str] = set()
        """Those whose import ended the warm interpreter."""
        self._retired: dict[int, Child] = {}
        self._store_up = True
        self._held: dict[str, Held] = {}
        self._lost_workers: list[WorkerLost] = []
        self._news = News()
        self._beat_due = float("inf")
        self._tick_at = 0.0
        self._sweep_at = 0.0
        self._interrupts = 0
        self._drain_deadline = float("inf")
        self._stop_again_at = float("inf")
        self._stop_deadline = float("inf")
        self._jobs_stopped = False
        self._ready_said = False

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Supervises until a signal ends it; returns the exit code."""
        self._start()
        while self.phase is not Phase.STOPPED:
            for key, _ in self._selector.select(self._timeout()):
                self._dispatch(key)
            self._replace_the_dead()
            self._pool.retire_outdated()
            self._claims.answer(may_start=self.phase is Phase.RUNNING)
            if self.phase is Phase.RUNNING and self._keeper_ready and self._store_up:
                self._claims.grant()
            self._tick()
            self._advance_shutdown()
        return 0

    def _start(self) -> None:
        become_subreaper()
        self._wakeup, wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(wakeup_end, False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, ("signal", None))
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the byte in the pipe is all that a handler does
        self._log.info(
            "started",
            pid=os.getpid(),
            workers=self._pool.desired,
            budget_mb=self._budget.total,
            queues=",".join(self._settings.queues) or "all",
        )

    def _timeout(self) -> float:
        if self._sweep_at:
            return SWEEP_SECONDS
        return max(0.0, min(self._beat_due, self._tick_at + TICK_SECONDS) - clock())

    def _dispatch(self, key: selectors.SelectorKey) -> None:
        if self._selector.get_map().get(key.fd) is not key:
            return  # closed by what was dispatched before it
        source, owner = key.data
        if source == "signal":
            self._take_signals()
            return
        child = owner if isinstance(owner, Child) else owner.worker if source == "worker" else owner.runner
        try:
            message, _ = child.channel.receive()
            child.heard_at = clock()
            self._handle(message, owner)
        except ChannelClosed:
            self._channel_closed(source, owner, child)
        except Exception as error:  # whoever says what cannot be understood is replaced, with all that it holds
            self._log.error("message_failed", role=child.role, pid=child.pid, error=error)
            if source == "runner":
                self._pool.kill_runner(owner, "not understood")
            else:
                self._pool.kill(child, "not understood")

    def _channel_closed(self, source: str, owner: Child | Slot, child: Child) -> None:
        if source == "runner" and isinstance(owner, Slot):
            self._pool.runner_gone(owner)
            self._sweep_at = clock()
        else:
            self._selector.unregister(child.channel.fileno())  # its death follows, and is reaped

    # -- messages -----------------------------------------------------------------------------------------------------

    def _handle(self, message: Message, owner: Child | Slot) -> None:
        match message, owner:
            case Claimed(), Slot():
                self._claimed(message, owner)
            case NothingDue(), Slot():
                self._nothing_due(message, owner)
            case Released(), Slot():
                self._claims.released(message, owner)
            case Finished(), Slot():
                self._finished(message)
            case Hungry(), Slot():
                owner.hungry, owner.mean_seconds = True, message.mean_seconds
            case Usage(), Slot():
                if message.token in self._held:
                    self._held[message.token].used_mb = message.used_mb
            case WorkerReady(), Slot():
                owner.worker_name = message.worker
                self._slot_ready(owner)
            case RunnerForked(), Child():
                self._pool.runner_forked(message.slot, message.pid)
                if message.slot in self._pool.slots:
                    self._slot_ready(self._pool.slots[message.slot])
            case WarmReady(), Child():
                self._warm_is_ready(message, owner)
            case Preloading(), Child():
                self._preloading = message.module
            case PreloadChanged(), Child():
                self._log.info("preload_changed", module=message.module)
                self._fatal_modules.clear()
                self._replace_warm()
            case KeeperReady() | StoreState(), Child() if owner is not self._keeper:
                pass  # from one that was replaced
            case KeeperReady(), Child():
                self._keeper_ready = self._store_up = True
                self._claims.look()
            case Wake(), Child():
                self._claims.wake(message.count)
            case Renewed(), Child():
                self._renewed(message)
            case LeasesLost(), Child():
                self._stop_jobs(message.tokens, Ending.LEASE_ENDED, now=True)
            case CancelRequested(), Child():
                self._stop_jobs([message.token], Ending.CANCELLED)
            case StoreState(), Child():
                self._store_up = message.up
                self._claims.look()
            case QueueHead(), Child():
                self._claims.head(message.memory_mb)
            case Pong(), _:
                pass
            case _:
                self._log.error("unexpected_message", message=type(message).__name__)

    def _slot_ready(self, slot: Slot) -> None:
        if slot.state is SlotState.STARTING and slot.worker_name and slot.runner.pid:
            slot.state = SlotState.IDLE

    def _claimed(self, claimed: Claimed, slot: Slot) -> None:
        self._news.claimed += claimed.jobs
        self._news.operations += claimed.operations
        lease = self._settings.lease_seconds
        deadline = clock() + lease - lease_margin(lease)
        for job in claimed.jobs:
            self._log.debug(
                "job_claimed", job_id=job.job_id, attempt=job.attempt, queue=job.queue, memory_mb=job.memory_mb
            )
            self._held[job.token] = Held(job, slot, claimed.grant, deadline=deadline)
        self._claims.claimed(claimed, slot)

    def _nothing_due(self, nothing: NothingDue, slot: Slot) -> None:
        self._news.operations += nothing.operations
        if nothing.error is not None:
            self._log.warning("claim_failed", error=nothing.error)
        self._claims.nothing_due(nothing, slot)

    def _finished(self, finished: Finished) -> None:
        self._news.finished += finished.jobs
        self._news.operations += finished.operations
        self._let_go([*finished.returned, *(job.token for job in finished.jobs)])
        for job in finished.jobs:
            report = self._log.info if job.status == "completed" else self._log.warning
            report(
                "job_finished" if job.held else "job_disowned",
                job_id=job.job_id,
                attempt=job.attempt,
                status=job.status,
                reason=job.reason,
                error=job.error,
                seconds=round(job.duration_seconds, 3),
                peak_mb=job.peak_memory_mb,
            )

    def _let_go(self, tokens: Collection[str]) -> None:
        """MongoDB knows that these jobs run no more: with the last one of a grant its memory is free."""
        over = {held.grant for token in tokens if (held := self._held.pop(token, None)) is not None}
        for grant in over - {held.grant for held in self._held.values()}:
            self._claims.written(grant)

    def _warm_is_ready(self, ready: WarmReady, child: Child) -> None:
        if child is not self._warm:
            return
        self._warm_ready, self._preloading = True, None
        self._pool.replace_all()  # what was forked from an earlier one went on until now
        self._warm_problems = list(ready.problems)
        for problem in ready.problems:
            self._log.error("preload_problem", msg=problem)
        self._log.info("warm_interpreter_ready", pid=ready.pid, preloaded=",".join(ready.modules), usable=ready.usable)

    def _renewed(self, renewed: Renewed) -> None:
        for token in renewed.tokens:
            held = self._held.get(token)
            if held is not None:
                held.deadline = renewed.deadline
                held.slot.runner.send(Extend(token, renewed.deadline))

    def _stop_jobs(self, tokens: Collection[str], ending: Ending, *, now: bool = False) -> None:
        for token in tokens:
            held = self._held.get(token)
            if held is not None:
                held.slot.runner.send(Stop(token, ending.value, now))

    # -- children -----------------------------------------------------------------------------------------------------

    def _replace_the_dead(self) -> None:
        for pid, exit_code in reap().items():
            self._child_died(pid, exit_code)
        for slot in self._pool.finish_ends():
            self._slot_gone(slot)
        if self._sweep_at and not self._pool.kill_strays() and clock() - self._sweep_at > 0.05:
            self._sweep_at = 0.0
        if self.phase >= Phase.STOPPING:
            return
        if self._warm is None and self._warm_backoff.allows():
            self._warm = self._started(
                lambda: self._start_warm(self._settings, self._fatal_modules), self._warm_backoff
            )
        leaving = any(child.role == "keeper" for child in self._retired.values())  # it has to hand over its totals
        if self._keeper is None and not leaving and self._keeper_backoff.allows():
            self._keeper = self._started(self._fork_keeper, self._keeper_backoff)
            self._report_lost_workers()
        if self._lookout is None and self._lookout_backoff.allows():
            self._lookout = self._started(self._fork_lookout, self._lookout_backoff)
        if self._warm is not None and self._warm_ready and self.phase is Phase.RUNNING:
            self._pool.fill(self._warm)

    def _child_died(self, pid: int, exit_code: int) -> None:
        for slot in self._pool.slots.values():
            if slot.worker.pid == pid and slot.worker.alive:
                self._hear_out(slot.worker, slot)
        if self._pool.worker_died(pid, exit_code):
            return
        self._pool.discharge(pid)
        if self._keeper is not None and pid == self._keeper.pid:
            self._forget(self._keeper, "keeper_died", exit_code, self._keeper_backoff)
            self._keeper, self._keeper_ready = None, False
        elif self._lookout is not None and pid == self._lookout.pid:
            self._forget(self._lookout, "lookout_died", exit_code, self._lookout_backoff)
            self._lookout = None  # the runners watch all jobs until there is a new one
        elif self._warm is not None and pid == self._warm.pid:
            self._forget(self._warm, "warm_interpreter_died", exit_code, self._warm_backoff)
            self._warm, self._warm_ready = None, False  # its runners go on until there is a new one
            if self._preloading is not None:
                self._log.error("preload_fatal", module=self._preloading, msg="its import ended the interpreter")
                self._fatal_modules.add(self._preloading)
                self._preloading = None
        elif pid in self._retired:
            self._close(self._retired.pop(pid))
        else:
            self._sweep_at = clock()  # an orphan: a runner has died

    def _forget(self, child: Child, reason: str, exit_code: int, backoff: Backoff) -> None:
        self._hear_out(child, child)
        self._close(child)
        if self.phase < Phase.STOPPING:
            self._log.error(reason, pid=child.pid, exit_code=exit_code)
            self._pool.restarts.append(reason)
            backoff.died(clock() - child.started_at)

    def _hear_out(self, child: Child, owner: Child | Slot) -> None:
        """The last words of the dead: outcomes that were written, a runner that was forked."""
        with contextlib.suppress(ChannelClosed):
            while child.channel.has_message():
                self._handle(child.channel.receive()[0], owner)

    def _close(self, child: Child) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.channel.fileno())
        child.channel.close()

    def _slot_gone(self, slot: Slot) -> None:
        """No process of it is left: what its worker held may be given to anyone."""
        self._claims.slot_gone(slot)
        for token in [token for token, held in self._held.items() if held.slot is slot]:
            del self._held[token]
        retired = slot.worker_name == ""
        if not retired:
            cause = "worker_died" if self.phase is Phase.RUNNING else "shutdown"
            self._lost_workers.append(WorkerLost(slot.worker_name, slot.worker.pid, cause))
            self._report_lost_workers()

    def _report_lost_workers(self) -> None:
        while self._lost_workers and self._keeper is not None and self._keeper.send(self._lost_workers[0]):
            del self._lost_workers[0]

    def _started(self, start: Callable[[], Child], backoff: Backoff) -> Child | None:
        try:
            child = start()
        except OSError as error:  # no process, descriptor or memory is left: later there may be
            self._log.error("process_not_started", error=error)
            backoff.died(0.0)
            return None
        self._pool.account_for(child.pid)
        self._selector.register(child.channel.fileno(), selectors.EVENT_READ, ("child", child))
        return child

    def _fork_keeper(self) -> Child:
        return self._forked("keeper", self._run_keeper, self._keeper_descriptors)

    def _fork_lookout(self) -> Child:
        return self._forked("lookout", self._run_lookout, self._lookout_descriptors)

    def _forked(self, role: str, run: Callable[[Channel], int], descriptors: Collection[int]) -> Child:
        ours, theirs = Channel.pair()
        pid = fork()
        if pid == 0:
            run_forked(lambda: run(theirs), (theirs,), keep=descriptors)
        theirs.close()
        return Child(role, pid, ours)

    def _replace_warm(self) -> None:
        """The old one forks what it was asked to, and ends; its runners go on until the new one is ready."""
        if self._warm is not None:
            self._retired[self._warm.pid] = self._warm
            self._warm.channel.end()
            self._warm = None
        self._warm_ready = False

    # -- every second -------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = clock()
        is_tick = now - self._tick_at >= TICK_SECONDS
        if self._news and self._beat_due == float("inf"):
            self._beat_due = now + BEAT_SECONDS
        if not is_tick and now < self._beat_due:
            return
        self._beat_due = float("inf")
        beat = self._beat()
        if self._keeper is not None and self._keeper.offer(beat):
            self._news = News()
            self._pool.restarts = []
        elif len(self._news.operations) > 10_000:
            self._news = News()  # without a keeper nobody counts
        if is_tick:
            self._tick_at = now
            self._look_after_children(now)
            self._look_after_host()
            self._tell_systemd(beat)

    def _look_after_children(self, now: float) -> None:
        patience = max(10.0, self._settings.lease_seconds)
        self._pool.look_for_hung(patience)
        warm_patience = patience if self._warm_ready else PRELOAD_SECONDS
        for child, its_patience in ((self._keeper, patience), (self._lookout, patience), (self._warm, warm_patience)):
            if child is not None and child.is_hung(now, its_patience):
                self._pool.kill(child, "no sign of life")
                child.pinged_at = now
        for child in self._retired.values():
            if now - child.heard_at > 2 * patience:
                self._pool.kill(child, "does not end")
        if self._pool.strays():
            self._sweep_at = now
        self._end_overdue_runners(now)

    def _end_overdue_runners(self, now: float) -> None:
        """A runner ends its job by itself when the lease cannot be relied on any more. One that was stopped cannot."""
        overdue = lease_margin(self._settings.lease_seconds) / 2
        for held in self._held.values():
            if held.slot.grants and held.slot.runner.alive and now > held.deadline + overdue:
                job = held.job
                self._log.error("runner_overdue", slot=held.slot.number, job_id=job.job_id, attempt=job.attempt)
                self._pool.kill_runner(held.slot)

    def _look_after_host(self) -> None:
        """Other programs use memory too: while it is short, nothing more is claimed."""
        try:
            why = pressure(self._settings.memory_pressure)
        except OSError as error:  # no descriptor is left: jobs go on, and there may be one later
            self._log.error("host_not_seen", error=error)
            return
        if why is not None and self._budget.paused is None:
            self._log.warning("claiming_paused", msg=why)
            self._budget.pause(why)
        elif why is None and self._budget.paused is not None:
            self._log.info("claiming_resumed")
            self._budget.resume()
            self._claims.look()
        elif why is not None:
            self._budget.pause(why)

    def _beat(self) -> Beat:
        states = [slot.state for slot in self._pool.slots.values()]
        busy = sum(state in (SlotState.BUSY, SlotState.RETIRING) for state in states)
        idle = sum(state in (SlotState.IDLE, SlotState.CLAIMING) for state in states)
        free = self._budget.free
        return Beat(
            phase=self.phase.name.lower(),
            idle=idle,
            busy=busy,
            starting=len(states) - idle - busy,
            budget_mb=self._budget.total,
            reserved_mb=self._budget.reserved,
            used_mb=sum(held.used_mb for held in self._held.values()),
            running=[
                RunningJob(
                    token=token,
                    job_id=held.job.job_id,
                    attempt=held.job.attempt,
                    worker_pid=held.slot.worker.pid,
                    memory_mb=held.job.memory_mb,
                    used_mb=held.used_mb,
                    deadline=held.deadline,
                )
                for token, held in self._held.items()
            ],
            claimed=self._news.claimed,
            finished=self._news.finished,
            operations=self._news.operations,
            restarts=self._pool.restarts,
            problems=self._problems(idle + busy),
            paused=self._budget.paused,
            blocked_mb=max(1, free) if self._budget.reserved else 0,
        )

    def _problems(self, workers: int) -> list[str]:
        problems = list(self._warm_problems)
        if self.phase is not Phase.RUNNING:
            problems.append("draining: no jobs are claimed any more")
        if not self._warm_ready and workers == 0:
            problems.append("the warm interpreter is not ready")
        if workers == 0:
            problems.append("no worker is up")
        return problems

    def _tell_systemd(self, beat: Beat) -> None:
        ready = self._keeper_ready and beat.idle + beat.busy > 0
        if ready and not self._ready_said:
            self._ready_said = True
            self._log.info("ready", workers=beat.idle + beat.busy)
            notify("READY=1")
        notify(f"WATCHDOG=1\nSTATUS={beat.phase}: {beat.busy} of {beat.busy + beat.idle} workers busy")

    # -- signals ------------------------------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._wakeup, 4096):
                act = SIGNALS.get(signal.Signals(number))
                if act is not None:
                    self._log.info("signal", name=signal.Signals(number).name)
                    act(self)

    def drain(self) -> None:
        """Claim nothing more, let jobs finish until the deadline, stop them, and end."""
        if self.phase is Phase.RUNNING:
            self.phase = Phase.DRAINING
            self._drain_deadline = self._stop_again_at = clock() + self._settings.shutdown_timeout
            self._log.info("draining", running=len(self._held), seconds=self._settings.shutdown_timeout)
            for slot in self._pool.slots.values():
                slot.worker.send(GiveBack())
            notify("STOPPING=1")

    def interrupt(self) -> None:
        """The first Ctrl-C drains, the second stops the jobs, the third does not wait for their grace."""
        self._interrupts += 1
        if self._interrupts == 1:
            self.drain()
        else:
            self.stop_now()

    def stop_now(self) -> None:
        """The deadline of the drain is now."""
        self.drain()
        self._drain_deadline = self._stop_again_at = clock()
        self._stop_jobs(list(self._held), Ending.INTERRUPTED, now=self._jobs_stopped)
        self._jobs_stopped = True

    def add_worker(self) -> None:
        """One worker more, until a reload goes back to the setting."""
        self._pool.desired += 1
        self._log.info("resized", workers=self._pool.desired)

    def remove_worker(self) -> None:
        """One worker fewer, but never none, once it has no job; until a reload goes back to the setting."""
        self._pool.desired = max(1, self._pool.desired - 1)
        self._log.info("resized", workers=self._pool.desired)

    def reload(self) -> None:
        """Reads the settings again, and replaces everything that was made from them, without losing a job."""
        if self.phase is not Phase.RUNNING:
            self._log.warning("reload_refused", msg="the supervisor is about to end")
            return
        try:
            self._settings = self._reload()
        except (ConfigurationError, OSError, ValueError) as error:
            self._log.error("reload_refused", error=error, msg="the settings of before stay in force")
            return
        self._fatal_modules.clear()
        self._pool.desired = self._settings.workers
        self._budget.resize(self._settings.memory_budget or self._default_budget_mb)
        self._replace_warm()
        if self._keeper is not None:
            self._keeper.send(Retire())
            self._retired[self._keeper.pid] = self._keeper
            self._keeper, self._keeper_ready = None, False
        self._log.info("reloaded", workers=self._pool.desired, budget_mb=self._budget.total)

    def report(self) -> None:
        """Writes the state of the pool to the log."""
        for slot in self._pool.slots.values():
            held = next((held for held in self._held.values() if held.slot is slot), None)
            self._log.info(
                "slot",
                slot=slot.number,
                state=slot.state.value,
                worker_pid=slot.worker.pid,
                runner_pid=slot.runner.pid,
                job_id=held.job.job_id if held else None,
                attempt=held.job.attempt if held else None,
                memory_mb=held.job.memory_mb if held else None,
                used_mb=held.used_mb if held else None,
            )
        self._log.info(
            "pool",
            phase=self.phase.name.lower(),
            desired=self._pool.desired,
            budget_mb=self._budget.total,
            reserved_mb=self._budget.reserved,
            keeper_pid=self._keeper.pid if self._keeper else None,
            lookout_pid=self._lookout.pid if self._lookout else None,
            warm_pid=self._warm.pid if self._warm else None,
            mongodb="up" if self._store_up else "down",
            announced=self._claims.announced,
        )

    # -- shutdown -----------------------------------------------------------------------------------------------------

    def _advance_shutdown(self) -> None:
        now = clock()
        if self.phase is Phase.DRAINING:
            if now >= self._stop_again_at:
                self._stop_jobs(list(self._held), Ending.INTERRUPTED)
                self._stop_again_at = now + 1.0  # said again to jobs that started meanwhile
            awaited = {SlotState.BUSY}
            if now < self._drain_deadline:
                awaited.add(SlotState.CLAIMING)  # later on it is none of ours: a claim can hang like MongoDB
            if not any(slot.state in awaited for slot in self._pool.slots.values()):
                self.phase = Phase.STOPPING
                self._stop_deadline = now + STOP_SECONDS
                self._pool.desired = 0
                for slot in self._pool.slots.values():
                    self._pool.retire(slot)
        if self.phase is Phase.STOPPING and not self._pool.slots:
            self._stop_helpers()
        if self.phase is Phase.STOPPING and now >= self._stop_deadline:
            self._log.error("stop_timed_out", slots=len(self._pool.slots))
            self._pool.kill_everything()
            self.phase = Phase.STOPPED

    def _stop_helpers(self) -> None:
        for helper in (self._warm, self._lookout):  # they hold nothing, and one may be importing for long
            if helper is not None:
                self._retired[helper.pid] = helper
                self._close(helper)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(helper.pid, signal.SIGKILL)
        self._warm = self._lookout = None
        if self._keeper is not None:
            self._keeper.send(self._beat())
            self._keeper.send(Retire())
            self._retired[self._keeper.pid] = self._keeper
            self._keeper = None
        if not self._retired:
            self.phase = Phase.STOPPED
            self._log.info("stopped")


SIGNALS: dict[signal.Signals, Callable[[Supervisor], None]] = {
    signal.SIGTERM: Supervisor.drain,
    signal.SIGINT: Supervisor.interrupt,
    signal.SIGQUIT: Supervisor.stop_now,
    signal.SIGHUP: Supervisor.reload,
    signal.SIGTTIN: Supervisor.add_worker,
    signal.SIGTTOU: Supervisor.remove_worker,
    signal.SIGUSR1: Supervisor.report,
}
