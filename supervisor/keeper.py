"""The host's duties at MongoDB: leases, reclaim, wake-ups, registration, retention, and the HTTP server.

    supervisor ──Beat, WorkerLost──► keeper ──► MongoDB
    supervisor ◄─Wake, Renewed, LeasesLost, CancelRequested, StoreState── keeper ◄── change stream

The main loop only listens to the supervisor, so it answers while MongoDB hangs. Four threads wait for MongoDB: one
keeps leases and one wakes the pool, which must never queue behind a slow question, one asks the slow questions, and
one listens to changes. The HTTP server's threads wait for nobody. When the keeper dies, the supervisor starts another
one: everything it knows comes with the next beat.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from supervisor import __version__
from supervisor.errors import StoreUnavailable, SupervisorError
from supervisor.events import Logger, logger
from supervisor.leases import Cause, LeaseKeeper, Reclaimed
from supervisor.messages import (
    Beat,
    CancelRequested,
    Channel,
    ChannelClosed,
    KeeperReady,
    LeasesLost,
    Message,
    Ping,
    Pong,
    QueueHead,
    Renewed,
    Retire,
    StoreState,
    Wake,
    WorkerLost,
)
from supervisor.metrics import Metrics, QueueState
from supervisor.processes import clock
from supervisor.settings import Settings
from supervisor.store.jobs import JobStore, is_refusal
from supervisor.store.reports import Reports
from supervisor.store.supervisors import Identity, SupervisorStore
from supervisor.store.transitions import Demand
from supervisor.store.wakeup import BecamePending, CancelAsked, Change, ChangesUnavailable, JobChanges, Opened
from supervisor.totals import Totals
from supervisor.web.server import Health, Readiness

TOTALS_SECONDS = 10.0
"""So often what this process counts by itself is kept for the next one; news of the pool at once, which takes 1 ms."""
REGISTER_SECONDS = 10.0
FIRST_LOOK_SECONDS = 0.1
BURST_SECONDS = 0.005
LOOK_AGAIN_SECONDS = 0.2
REGISTER_AGAIN_SECONDS = 2.0
"""At most so often it is written at once that something has changed."""
COUNT_SECONDS = 10.0
COUNT_DUTY = 50
"""Counting takes at most one fiftieth of the time: a large collection is counted less often."""
REFUSE_SECONDS = 60.0
RETENTION_SECONDS = 600.0
HEAD_SECONDS = 1.0
ADOPT_SECONDS = 0.1
STALE_BEAT_SECONDS = 15.0
RETRY_SECONDS = (0.25, 0.5, 1.0)
RENEWALS = 6
"""So often within its time a lease is renewed: an outage shorter than three quarters of it ends no job."""
ERRAND = "errand"


@dataclass(slots=True)
class Duty:
    """Something that is done again and again; `run` returns the seconds until the next time."""

    name: str
    run: Callable[[], float]
    due: float = 0.0


class DutyThread:
    """Does its duties when they are due, and jobs that are put to it at once; tells when MongoDB is away."""

    def __init__(
        self, name: str, duties: list[Duty], store_state: Callable[[str, StoreUnavailable | None], None]
    ) -> None:
        self._duties = duties
        self._store_state = store_state
        self._errands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        """None: only wakes the thread."""
        self._failures = 0
        self._failing: set[str] = set()
        """Duties whose last attempt failed: that another one had nothing to do proves nothing."""
        self._stopped = Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, errand: Callable[[], object]) -> None:
        """Has something done as soon as possible, and again until MongoDB takes it."""
        self._errands.put(errand)

    def retry_failed(self) -> None:
        """Makes what failed last due now."""
        for name in self._failing - {ERRAND}:
            self.hasten(name)

    def hasten(self, name: str) -> None:
        """Makes a duty due now."""
        for duty in self._duties:
            if duty.name == name:
                duty.due = 0.0
        self._errands.put(None)

    def stop(self, timeout_seconds: float) -> None:
        self._stopped.set()
        self._errands.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._stopped.is_set():
            timeout = max(0.0, min((duty.due for duty in self._duties), default=1.0) - clock())
            with contextlib.suppress(Empty):
                errand = self._errands.get(timeout=timeout)
                if errand is not None:
                    self._attempt(ERRAND, errand)
            for duty in self._duties:
                if duty.due <= clock() and not self._stopped.is_set():
                    self._perform(duty)

    def _perform(self, duty: Duty) -> None:
        duty.due = unless_hastened = clock() + RETRY_SECONDS[-1]

        def run() -> None:
            following = duty.run()
            if duty.due == unless_hastened:
                duty.due = clock() + following

        if not self._attempt(duty.name, run) and duty.due == unless_hastened:
            duty.due = clock() + RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1]

    def _attempt(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except StoreUnavailable as error:
            if is_refusal(error):  # MongoDB is there, and one document is what is wrong
                logger("keeper").error("duty_refused", duty=name, error=error)
                return False
            self._failures += 1
            self._failing = self._failing | {name}
            self._store_state(name, error)
            if name == ERRAND:
                self._stopped.wait(RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1])
                self._errands.put(work)
            return False
        except ChannelClosed:
            self._stopped.set()
            return False
        except Exception as error:
            logger("keeper").error("duty_failed", error=error)
            return False
        if name in self._failing:
            self._failing = self._failing - {name}
            self._failures = 0
            self._store_state(name, None)
        return True


class DueTimes:
    """When the jobs that are scheduled for later become due, as far as they were seen. On the host's clock."""

    def __init__(self) -> None:
        self._heap: list[float] = []
        self._due_already = 0
        self._lock = Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            if len(self._heap) < 100_000:  # what is left out is found by the look at the next due job
                heapq.heappush(self._heap, clock() + seconds)

    def add_due(self) -> bool:
        """One that is due already; whether it is the first since the last call of `pop_due`."""
        with self._lock:
            self._due_already += 1
            return self._due_already == 1

    def pop_due(self) -> int:
        """How many have become due since the last call."""
        with self._lock:
            count, self._due_already = self._due_already, 0
            while self._heap and self._heap[0] <= clock():
                heapq.heappop(self._heap)
                count += 1
        return count

    def next_in(self) -> float | None:
        with self._lock:
            return max(0.0, self._heap[0] - clock()) if self._heap else None


@dataclass(slots=True)
class PoolView:
    """What the supervisor last said of the pool."""

    beat: Beat | None = None
    seen_at: float = field(default_factory=clock)
    store_error: str | None = "not connected yet"


class Keeper:
    """The main loop of the keeper."""

    def __init__(
        self,
        supervisor: Channel,
        *,
        settings: Settings,
        identity: Identity,
        jobs: JobStore,
        supervisors: SupervisorStore,
        leases: LeaseKeeper,
        metrics: Metrics,
        totals: Totals,
        revive_store: Callable[[], object] = lambda: None,
        log: Logger | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._identity = identity
        self._jobs = jobs
        self._supervisors = supervisors
        self._leases = leases
        self._metrics = metrics
        self._totals = totals
        self._reports = Reports(jobs)
        self._revive_store = revive_store
        self._log = log or logger("keeper")
        self._view = PoolView()
        self._due_times = DueTimes()
        self._stop = Event()
        self._state_lock = Lock()
        self._down_since: float | None = None
        self._failing: set[str] = set()
        self._ready = False
        self._head_flagged = False
        self._woken_at = self._looked_at = 0.0
        self._registered_at = self._kept_at = 0.0
        self._adopted_at = 0.0
        renew_every = settings.lease_seconds / RENEWALS
        self._lease_thread = DutyThread(
            "leases",
            [
                Duty("start", self._prepare_once),
                Duty("renew", lambda: self._renew_once(renew_every)),
                Duty("reclaim", lambda: self._reclaim_once(renew_every)),
                Duty("register", self._register_once),
                Duty("cancel", self._cancel_once),
            ],
            self._note_store,
        )
        self._queue_thread = DutyThread(
            "queue",
            [
                Duty("poll", self._poll_once),
                Duty("due", self._due_once),
                Duty("head", self._head_once),
            ],
            self._note_store,
        )
        self._report_thread = DutyThread(
            "reports",
            [
                Duty("refuse", self._refuse_once),
                Duty("count", self._count_once),
                Duty("retention", self._retention_once),
            ],
            self._note_store,
        )
        self._listener = Thread(target=self._listen, name="changes", daemon=True)

    # -- main loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Listens to the supervisor until it says so or is gone; returns the exit code."""
        self._lease_thread.start()
        self._queue_thread.start()
        self._report_thread.start()
        self._listener.start()
        try:
            while not self._stop.is_set():
                self._handle(self._supervisor.receive()[0])
            return 0
        except ChannelClosed:
            return 1
        finally:
            self._stop.set()

    def _handle(self, message: Message) -> None:
        match message:
            case Beat():
                self._take_beat(message)
            case Ping():
                self._supervisor.send(Pong())
            case WorkerLost():
                worker, cause = message.worker, message.cause
                self._lease_thread.put(lambda: self._reclaim_worker(worker, cause))
            case Retire():
                self._say_goodbye()
                self._totals.keep(self._metrics.totals())
                self._stop.set()
            case _:
                pass

    def _take_beat(self, beat: Beat) -> None:
        before, self._view.beat, self._view.seen_at = self._view.beat, beat, clock()
        if _picture(beat) != _picture(before) and clock() - self._registered_at > REGISTER_AGAIN_SECONDS:
            self._registered_at = clock()
            self._lease_thread.hasten("register")
        self._metrics.record(beat)
        counted = beat.claimed or beat.finished or beat.operations or beat.restarts
        if counted or clock() - self._kept_at > TOTALS_SECONDS:
            self._kept_at = clock()
            self._totals.keep(self._metrics.totals())
        if beat.blocked_mb and not self._head_flagged:
            self._head_flagged = True
            self._queue_thread.hasten("head")
        if any(finished.spooled for finished in beat.finished):
            self._lease_thread.put(self._leases.replay_once)

    def _say_goodbye(self) -> None:
        """Everything has ended: this supervisor is no longer one."""
        done = Event()

        def goodbye() -> None:
            self._leases.replay_once()
            self._supervisors.remove(self._identity.supervisor_id)
            done.set()

        self._lease_thread.put(goodbye)
        done.wait(timeout=5.0 if self._ready and self._down_since is None else 0.5)

    # -- MongoDB comes and goes ---------------------------------------------------------------------------------------

    def _note_store(self, duty: str, error: StoreUnavailable | None) -> None:
        """Called by every thread after a failure, and after the first success of the same duty that follows."""
        with self._state_lock:
            was_down = self._down_since is not None
            if error is None:
                self._failing.discard(duty)
                if self._failing:
                    self._lease_thread.retry_failed()
                    self._queue_thread.retry_failed()
                    self._report_thread.retry_failed()
                    return
            else:
                self._failing.add(duty)
            self._view.store_error = str(error) if error else None
            self._metrics.mongo_up(error is None)
            if error is not None:
                if not was_down:
                    self._down_since = clock()
                    self._log.error("mongodb_lost", error=error)
                    self._tell(StoreState(up=False, error=str(error)))
                with contextlib.suppress(SupervisorError):
                    self._revive_store()
            elif was_down and self._ready:
                away = clock() - (self._down_since or clock())
                self._down_since = None
                self._leases.was_away()
                self._log.warning("mongodb_back", away_seconds=round(away, 1))
                self._lease_thread.put(self._leases.replay_once)
                self._lease_thread.hasten("renew")
                self._tell(StoreState(up=True))
                self._tell(Wake(0))

    def _tell(self, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):  # the main loop notices as well
            self._supervisor.send(message)

    # -- leases -------------------------------------------------------------------------------------------------------

    def _prepare_once(self) -> float:
        """Connects: indexes, registration, the results on disk, and what an earlier self left running."""
        self._jobs.ensure_indexes(by_queue=bool(self._settings.queues))
        self._jobs.refuse_duplicates()
        self._supervisors.register(self._identity, self._facts())
        self._leases.replay_once()
        self._count_reclaimed("startup", self._leases.reclaim_startup_once())
        self._jobs.adopt()
        with self._state_lock:
            self._ready = True
            if self._down_since is None:
                self._view.store_error = None
                self._metrics.mongo_up(True)
        self._tell(KeeperReady())
        return float("inf")

    def _renew_once(self, every: float) -> float:
        beat = self._view.beat
        if not self._ready or beat is None:
            return min(every, FIRST_LOOK_SECONDS)  # leases that an earlier keeper renewed may end soon
        if not (beat.running or self._leases.has_waiting_results()):
            return every
        if clock() - self._view.seen_at > max(STALE_BEAT_SECONDS, self._settings.lease_seconds):
            return every  # the supervisor is stopped: nobody says that its jobs still run
        renewal = self._leases.renew_once([job.token for job in beat.running])
        self._tell(Renewed(renewal.kept, renewal.deadline))
        if renewal.lost:
            # A job may have finished since the beat: the supervisor knows.
            self._tell(LeasesLost(renewal.lost))
        return every

    def _reclaim_once(self, every: float) -> float:
        if self._ready:
            self._leases.replay_once()
            self._leases.end_orphans_once()
            self._count_reclaimed("lease_expired", self._leases.reclaim_expired_once())
        return every * random.uniform(0.8, 1.2)  # supervisors that were started together need not look together

    def _reclaim_worker(self, worker: str, cause: str) -> None:
        self._leases.replay_once()
        known: Cause = "shutdown" if cause == "shutdown" else "worker_died"
        self._count_reclaimed(known, self._leases.reclaim_worker_once(worker, known))

    def _count_reclaimed(self, cause: Cause, reclaimed: Reclaimed) -> None:
        self._metrics.reclaimed(cause, reclaimed.pending)
        for status, reason in reclaimed.ended:
            self._metrics.ended(status, reason)
        if reclaimed.pending:
            self._tell(Wake(reclaimed.pending))

    def _register_once(self) -> float:
        if self._ready:
            self._supervisors.register(self._identity, self._facts())
        return REGISTER_SECONDS

    def _facts(self) -> dict[str, Any]:
        beat, settings = self._view.beat, self._settings
        facts: dict[str, Any] = {
            "version": __version__,
            "python": platform.python_version(),
            "queues": list(settings.queues),
            "workers": settings.workers,
            "start_method": settings.start_method,
            "metrics_port": settings.metrics_port,
            "task_roots": [str(root) for root in settings.roots],
        }
        if beat is not None:
            facts |= {
                "phase": beat.phase,
                "idle": beat.idle,
                "busy": beat.busy,
                "starting": beat.starting,
                "workers": beat.idle + beat.busy + beat.starting,
                "budget_mb": beat.budget_mb,
                "reserved_mb": beat.reserved_mb,
                "used_mb": beat.used_mb,
                "problems": beat.problems,
                "paused": beat.paused,
                "jobs": [asdict(job) for job in beat.running],
            }
        return facts

    def _cancel_once(self) -> float:
        """The fallback: requests normally arrive by the change stream."""
        if self._ready and self._view.beat is not None and self._view.beat.running:
            for token in self._jobs.cancel_requests(self._identity.supervisor_id):
                self._tell(CancelRequested(token))
        return self._settings.poll_interval

    # -- questions ----------------------------------------------------------------------------------------------------

    def _poll_once(self) -> float:
        """The fallback look at the queue."""
        if self._ready:
            self._jobs.adopt()
            self._tell(Wake(0))
        return self._settings.poll_interval * random.uniform(0.9, 1.1)

    def _refuse_once(self) -> float:
        """Documents of other programs that would wait for ever. Normally the change stream tells of them."""
        if not self._ready:
            return 1.0
        began = time.monotonic()
        self._jobs.refuse_never_due()
        return max(REFUSE_SECONDS, COUNT_DUTY * (time.monotonic() - began))

    def _due_once(self) -> float:
        """Wakes the pool when scheduled jobs become due."""
        if clock() - self._woken_at < BURST_SECONDS:
            return BURST_SECONDS
        due = self._due_times.pop_due()
        if due and self._ready:
            self._tell(Wake(due))
        if due and self._ready and clock() - self._looked_at > LOOK_AGAIN_SECONDS:
            self._look_for_next_due()
        following = self._due_times.next_in()
        return self._settings.poll_interval if following is None else min(following, self._settings.poll_interval)

    def _head_once(self) -> float:
        """Looks at the first due job when memory is short: is it passed over by smaller ones?"""
        beat = self._view.beat
        self._head_flagged = bool(beat and beat.blocked_mb)
        if not self._ready or beat is None or not beat.blocked_mb:
            return self._settings.poll_interval
        head = self._reports.head(Demand(queues=self._settings.queues, limit_mb=beat.budget_mb))
        needed = (head or {}).get("required_memory")
        self._tell(QueueHead(int(needed) if isinstance(needed, int | float) and math.isfinite(needed) else None))
        return HEAD_SECONDS

    def _count_once(self) -> float:
        if not self._ready:
            return 1.0
        began = time.monotonic()
        queues = self._reports.queues(only=self._settings.queues)
        self._metrics.set_queue_state(
            self._reports.jobs_by_status(),
            {name: QueueState(state.due, state.oldest_age_seconds) for name, state in queues.items()},
        )
        self._look_for_next_due()
        return max(COUNT_SECONDS, COUNT_DUTY * (time.monotonic() - began))

    def _look_for_next_due(self) -> None:
        """Those that were scheduled before this keeper listened to changes are known one at a time."""
        self._looked_at = clock()
        next_due, known = self._reports.next_due_in(only=self._settings.queues), self._due_times.next_in()
        if next_due is not None and (known is None or next_due < known):
            self._due_times.add(next_due)
            self._queue_thread.hasten("due")

    def _retention_once(self) -> float:
        days = self._settings.retention_days
        if days <= 0 or not self._ready:
            return RETENTION_SECONDS
        removed = self._jobs.remove_finished(days)
        if removed:
            self._log.info("jobs_removed", count=removed, older_than_days=days)
        return 0.0 if removed >= 1000 else RETENTION_SECONDS

    # -- changes ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        changes = JobChanges(self._jobs)
        pause = RETRY_SECONDS[0]
        while not self._stop.is_set():
            if not self._ready:
                self._stop.wait(0.02)
                continue
            try:
                changes.listen(self._take_change, self._stop)
                pause = RETRY_SECONDS[0]
            except ChangesUnavailable:
                self._log.warning("no_change_streams", msg="this server has none: the queue is polled")
                return
            except Exception as error:  # only a hint: whatever breaks it, polling goes on
                if not self._stop.is_set():
                    self._log.warning("change_stream_lost", error=error)
            self._stop.wait(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 10.0)

    def _take_change(self, change: Change) -> None:
        match change:
            case Opened():
                self._tell(Wake(0))
                self._report_thread.hasten("count")
            case CancelAsked():
                self._tell(CancelRequested(change.token))
            case BecamePending():
                self._take_pending(change)

    def _take_pending(self, change: BecamePending) -> None:
        queues = self._settings.queues
        if queues and change.queue is not None and change.queue not in queues:
            return
        if not change.is_complete:
            self._adopt_soon()
        if change.is_odd:
            self._report_thread.hasten("refuse")
        delay = 0.0
        if change.scheduled_date is not None:
            delay = (change.scheduled_date - (change.at or datetime.now(UTC))).total_seconds()
        if delay > 0:
            self._due_times.add(delay)
            self._queue_thread.hasten("due")
        elif clock() - self._woken_at > BURST_SECONDS:
            self._woken_at = clock()
            self._tell(Wake(1))
        elif self._due_times.add_due():  # many were inserted at once: they wake the pool together
            self._queue_thread.hasten("due")

    def _adopt_soon(self) -> None:
        """At once, or, where another program inserts many at a time, together."""
        if clock() - self._adopted_at < ADOPT_SECONDS:
            self._queue_thread.hasten("poll")
            return
        self._adopted_at = clock()
        with contextlib.suppress(StoreUnavailable):
            self._jobs.adopt()

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        silent = clock() - self._view.seen_at
        if silent > STALE_BEAT_SECONDS:
            return Health(False, [f"the main loop has been silent for {silent:.0f} s"])
        return Health(True)

    def readiness(self) -> Readiness:
        beat = self._view.beat
        reasons = list(self.health().reasons)
        if self._view.store_error is not None:
            reasons.append(f"MongoDB: {self._view.store_error}")
        if beat is None:
            reasons.append("the pool has not started yet")
        else:
            reasons += beat.problems
        return Readiness(not reasons, reasons)


def _picture(beat: Beat | None) -> object:
    """What of a beat people should not see late."""
    if beat is None:
        return None
    running = {job.token for job in beat.running}
    return beat.phase, beat.starting, beat.problems, beat.paused, beat.budget_mb, beat.used_mb, running
