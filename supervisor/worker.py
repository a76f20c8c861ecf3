"""One slot's database side: claims a job, hands it to the slot's runner, takes in its output, records its outcome.

    supervisor ──Claim──► worker ──find_one_and_update──► MongoDB
    worker ──Run──► runner … ──Ended──► worker ──conditional write──► MongoDB, Finished ──► supervisor

The main loop never waits for MongoDB: it reads the job's output and answers the supervisor while one other thread
makes the database's round trips in order. This process never forks. When MongoDB does not take an outcome, it goes to
the spool on disk, and the keeper writes it later. When the supervisor or the runner is gone, the worker writes what
it still has and ends; what it held is taken back by the keeper.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from supervisor.attempt import Attempt, Result, ServerClock, without
from supervisor.errors import InvalidJob, StoreUnavailable
from supervisor.events import Logger, logger
from supervisor.execution.orphans import MARKER
from supervisor.execution.task_roots import check_working_directory, resolve_script
from supervisor.job import Counts, JobSpec, Outcome, decide, lease_margin, outcome_of
from supervisor.messages import (
    AHEAD_SECONDS,
    Admit,
    Channel,
    ChannelClosed,
    Claim,
    Claimed,
    Ended,
    Finished,
    GiveBack,
    Hungry,
    Message,
    NothingDue,
    Operation,
    Ping,
    Pong,
    Refuse,
    Released,
    Retire,
    Run,
    WorkerReady,
)
from supervisor.output import Chunk, OutputCapture
from supervisor.processes import clock
from supervisor.settings import Settings, account_of
from supervisor.spool import Spool
from supervisor.states import Ending, Reason
from supervisor.store import transitions
from supervisor.store.jobs import JobStore, is_refusal
from supervisor.store.output import OutputStore
from supervisor.store.transitions import Demand, Move, Owner

FLUSH_SECONDS = 1.0
LOW_WATER = 8
"""With so few jobs left that were claimed ahead, more are asked for."""
RESULTS_TOGETHER = 32
RESULTS_WAIT_SECONDS = 0.05
"""While other jobs run, outcomes are written together, and wait for each other at most this long."""
NEVER = float("inf")
READ_BYTES = 65_536
MB = 1_048_576


@dataclass(slots=True)
class Timers:
    """When the main loop has something to do by itself, on `processes.clock()`."""

    flush: float = NEVER
    """Send what the running job has printed."""
    patience: float = NEVER
    """The running job counts as long from then on."""
    results: float = NEVER
    """Write the outcomes that wait for company."""
    flushing: bool = False

    def next_in_ms(self) -> float | None:
        first = min(self.flush, self.patience, self.results)
        return None if first == NEVER else max(0.0, (first - clock()) * 1000)


@dataclass(slots=True)
class Pace:
    """How long jobs take here, which decides whether others are claimed ahead."""

    mean_seconds: float = AHEAD_SECONDS
    _began: float = 0.0

    @property
    def is_short(self) -> bool:
        return self.mean_seconds < AHEAD_SECONDS / 2

    def started(self) -> float:
        """Returns when the job counts as long."""
        self._began = clock()
        return self._began + AHEAD_SECONDS

    def ended(self) -> None:
        self.mean_seconds += 0.3 * (clock() - self._began - self.mean_seconds)

    def slow_down(self) -> None:
        self.mean_seconds = max(self.mean_seconds, 2 * AHEAD_SECONDS)


class StoreThread:
    """Makes the round trips to MongoDB one after the other, and wakes the main loop with each answer."""

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = SimpleQueue()
        self._answers: deque[tuple[Callable[[Any], None], Any]] = deque()
        self.wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def submit(self, request: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Calls `request` in the thread, and `then` with its answer (or its exception) in the main loop."""
        self._requests.put((request, then))

    def deliver(self) -> None:
        """Hands out the answers that have come in; called by the main loop when `wakeup` is readable."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wakeup, 4096)
        while self._answers:
            then, answer = self._answers.popleft()
            then(answer)

    def finish(self, timeout_seconds: float) -> None:
        """Waits until everything submitted was done."""
        self._requests.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            if request is None:
                return
            work, then = request
            try:
                answer: Any = work()
            except Exception as error:  # the main loop decides what an error means
                answer = error
            self._answers.append((then, answer))
            with contextlib.suppress(BlockingIOError):
                os.write(self._wakeup_end, b"\0")


class Worker:
    """The main loop of one worker."""

    def __init__(
        self,
        supervisor: Channel,
        runner: Channel,
        *,
        owner: Owner,
        settings: Settings,
        open_store: Callable[[Callable[[str, float, bool], None]], JobStore],
        spool: Spool,
        log: Logger | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._runner = runner
        self._owner = owner
        self._settings = settings
        self._roots = settings.roots
        self._account = account_of(settings)
        self._spool = spool
        self._log = log or logger("worker")
        self._operations: list[Operation] = []
        self._store = open_store(lambda *operation: self._operations.append(operation))
        self._outputs = OutputStore(self._store)
        self._thread = StoreThread()
        self._poll = select.poll()  # with `selectors`, a tenth of the work was to register each job's streams
        self._streams: dict[int, tuple[Attempt, str]] = {}
        """Whose output it is, and which, by what it is read from."""
        self._current: Attempt | None = None
        self._ahead: deque[Attempt] = deque()
        self._waiting: dict[int, list[Attempt]] = {}
        self._open: dict[int, int] = {}
        self._results: list[Result] = []
        self._writing = 0
        self._claiming = 0
        self._retiring = False
        self._asked = False
        self._unsure: str | None = None
        """The token of a claim that may have been applied; belongs to the store's thread."""
        self._pace = Pace()
        self._timers = Timers()
        self._server_clock = ServerClock()

    # -- main loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Works until it is retired or one of its neighbours is gone; returns the exit code."""
        for descriptor in (self._supervisor.fileno(), self._runner.fileno(), self._thread.wakeup):
            self._poll.register(descriptor, select.POLLIN)
        self._supervisor.send(WorkerReady(self._owner.worker))
        try:
            while not (self._retiring and self._is_idle()):
                self._turn()
            return 0
        except ChannelClosed:
            return 1
        finally:
            self._write_results()
            self._thread.finish(timeout_seconds=10.0)
            with contextlib.suppress(ChannelClosed):
                self._thread.deliver()

    def _is_idle(self) -> bool:
        return not (self._current or self._ahead or self._waiting or self._claiming or self._results or self._writing)

    def _turn(self) -> None:
        for descriptor, _ in self._poll.poll(self._timers.next_in_ms()):
            if descriptor in self._streams:
                self._read(descriptor)
            elif descriptor == self._thread.wakeup:
                self._thread.deliver()
            elif descriptor == self._runner.fileno():
                self._handle(self._runner.receive()[0])
            elif descriptor == self._supervisor.fileno():
                self._handle(self._supervisor.receive()[0])
        now = clock()
        if self._timers.flush <= now:
            self._flush()
        if self._timers.patience <= now:
            self._lose_patience()
        if self._timers.results <= now:
            self._write_results()

    def _handle(self, message: Message) -> None:
        match message:
            case Ended() if self._current is not None and self._current.token == message.token:
                self._end(self._current, message)
            case Claim():
                self._claim(message)
            case Admit():
                self._admit(self._waiting.pop(message.grant, []))
                self._confirm_current()
            case Refuse():
                self._give_back(self._waiting.pop(message.grant, []))
            case GiveBack():
                self._give_back_ahead()
            case Ping():
                self._supervisor.send(Pong())
            case Retire():
                self._retiring = True
                self._give_back_ahead()
            case _:
                pass  # about a job that has ended meanwhile

    def _take_operations(self) -> list[Operation]:
        operations, self._operations = self._operations, []
        return operations

    # -- claiming -----------------------------------------------------------------------------------------------------

    def _claim(self, claim: Claim) -> None:
        self._asked = False
        if self._retiring or self._is_long():
            self._supervisor.send(NothingDue(claim.grant, []))
            return
        self._claiming += 1
        lease = self._settings.lease_seconds
        sent = clock()
        deadline = sent + lease - lease_margin(lease)

        def claimed(answer: Any) -> None:
            self._claiming -= 1
            if isinstance(answer, Exception):
                self._supervisor.send(NothingDue(claim.grant, self._take_operations(), error=str(answer)))
            elif not answer:
                self._supervisor.send(NothingDue(claim.grant, self._take_operations()))
            else:
                self._server_clock.compare(sent, answer[0]["lock"]["locked_at"])
                self._take_up([self._attempt(document, claim, deadline) for document in answer], claim)

        # What is to wait behind another job has not started, and may have to go back.
        sure_mb = 0 if self._current is not None or self._ahead else claim.sure_mb
        self._thread.submit(lambda: self._claim_or_find(claim, sure_mb), claimed)

    def _attempt(self, document: dict[str, Any], claim: Claim, deadline: float) -> Attempt:
        ahead = document["lock"].get("ahead") is True
        return Attempt(document, claim.grant, deadline, Counts.from_document(document), ahead)

    def _claim_or_find(self, claim: Claim, sure_mb: int) -> list[dict[str, Any]]:
        """A claim whose answer was lost may have been applied: it is looked up before anything else is claimed."""
        lease = self._settings.lease_seconds
        queues = self._settings.queues
        demand, together = (Demand(queues=queues, limit_mb=mb) for mb in (claim.limit_mb, claim.ahead_mb))
        token = secrets.token_hex(12)
        self._return_unsure()
        self._unsure = token
        try:
            found = self._claim_ahead(token, together, claim.count) if claim.count > 1 else []
            if not found:
                document = self._store.claim(self._owner, token, demand, lease, sure_mb=sure_mb)
                found = [] if document is None else [document]
        except StoreUnavailable as error:
            if is_refusal(error):
                why = f"document: MongoDB cannot lock it: {error.__cause__}"[:500]
                document = self._store.claim_or_refuse(self._owner, token, demand, lease, why)
                found = [] if document is None else [document]
            else:
                found = self._held_with(token)
        self._unsure = None
        return found

    def _claim_ahead(self, token: str, demand: Demand, count: int) -> list[dict[str, Any]]:
        try:
            return self._store.claim_ahead(self._owner, token, demand, self._settings.lease_seconds, count)
        except StoreUnavailable as error:
            if not is_refusal(error):
                raise
            return self._held_with(token)  # one of them cannot be locked: which one, a single claim will tell

    def _held_with(self, token: str) -> list[dict[str, Any]]:
        held = self._store.held_by(self._owner.worker)
        return [document for document in held if document["lock"]["token"].startswith(token)]

    def _return_unsure(self) -> None:
        """What an earlier claim may have taken, when not even that could be asked, has not started."""
        if self._unsure is not None:
            documents = self._held_with(self._unsure)
            moves = [transitions.give_back(document["_id"], document["lock"]["token"]) for document in documents]
            if moves:
                self._store.apply_all(moves, "give_back")
            self._unsure = None

    def _take_up(self, attempts: list[Attempt], claim: Claim) -> None:
        valid = [attempt for attempt in attempts if self._examine(attempt)]
        waits = sum(attempt.spec.required_memory for attempt in valid if attempt.spec) > claim.sure_mb
        self._open[claim.grant] = len(valid)
        if valid and not waits:
            self._admit(valid)  # first: what the supervisor hears of it can wait
        jobs = [attempt.claimed() for attempt in attempts]
        self._supervisor.send(Claimed(claim.grant, jobs, waits, self._take_operations()))
        if not valid:
            self._supervisor.send(Released(claim.grant))
        elif waits:
            self._waiting[claim.grant] = valid

    def _examine(self, attempt: Attempt) -> bool:
        """Whether the job can be run; if not, it has failed."""
        try:
            attempt.spec = spec = JobSpec.from_document(attempt.document)
            check_working_directory(spec.cwd)
            attempt.script = resolve_script(spec.python_path, self._roots, spec.cwd)
        except InvalidJob as error:
            self._record(attempt, Outcome(reason=Reason.INVALID_JOB, error=str(error)), [], [])
            return False
        return True

    def _admit(self, attempts: list[Attempt]) -> None:
        self._ahead.extend(attempts)
        if self._retiring or self._is_long():
            self._give_back_ahead()
        self._start_next()

    def _start_next(self) -> None:
        if self._current is None and self._ahead:
            self._start(self._ahead.popleft())
        if self._current is not None and not self._asked and self._pace.is_short and len(self._ahead) <= LOW_WATER:
            self._asked = True
            self._supervisor.send(Hungry(self._pace.mean_seconds))

    def _is_long(self) -> bool:
        """Whether the job that runs now is a long one: nothing may wait behind it."""
        return self._current is not None and self._timers.patience == NEVER

    def _lose_patience(self) -> None:
        """The job that runs takes its time: what was claimed to run after it goes back, and its attempt counts."""
        self._timers.patience = NEVER
        self._pace.slow_down()
        self._give_back_ahead()
        self._confirm_current()

    def _confirm_current(self) -> None:
        attempt = self._current
        if attempt is None or not attempt.ahead:
            return
        move = transitions.confirm(attempt.key, attempt.token)
        attempt.counts = dataclasses.replace(attempt.counts, attempts=attempt.number)
        attempt.ahead = False
        self._submit_move(move, "confirm", attempt)

    def _submit_move(self, move: Move, operation: str, attempt: Attempt) -> None:
        """A write that may fail: what it says will be said again when the job ends."""
        self._writing += 1

        def done(answer: Any) -> None:
            self._writing -= 1
            if isinstance(answer, Exception):
                self._log.warning(f"{operation}_failed", job_id=attempt.job_id, attempt=attempt.number, error=answer)

        self._thread.submit(lambda: self._store.apply(move, operation), done)

    def _give_back_ahead(self) -> None:
        attempts, self._ahead = list(self._ahead), deque()
        self._give_back(attempts)

    def _give_back(self, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        moves = [transitions.give_back(attempt.key, attempt.token) for attempt in attempts]
        self._writing += 1

        def given(answer: Any) -> None:
            self._writing -= 1
            if isinstance(answer, Exception):  # their leases end: somebody takes them back
                self._log.warning("give_back_failed", count=len(attempts), error=answer)
            self._supervisor.send(Finished([], [attempt.token for attempt in attempts], self._take_operations()))
            for attempt in attempts:
                self._close_grant(attempt.grant)

        self._thread.submit(lambda: self._store.apply_all(moves, "give_back"), given)

    def _close_grant(self, grant: int) -> None:
        """One job of the grant is over; with the last one this slot may claim again."""
        self._open[grant] -= 1
        if self._open[grant] == 0:
            del self._open[grant]
            self._supervisor.send(Released(grant))

    # -- running ------------------------------------------------------------------------------------------------------

    def _start(self, attempt: Attempt) -> None:
        assert attempt.spec is not None
        spec, settings = attempt.spec, self._settings
        attempt.output = OutputCapture(round(settings.log_limit * MB))
        self._current = attempt
        self._timers.patience = self._pace.started()
        write_ends = [self._open_stream(attempt, "stdout"), self._open_stream(attempt, "stderr")]
        environment = {
            **spec.env,
            "JOB_ID": attempt.job_id,
            "JOB_ATTEMPT": str(attempt.number),
            "JOB_REQUIRED_MEMORY": str(spec.required_memory),
        }
        environment.pop(MARKER, None)  # ours, not the job's: by it orphans are known
        try:
            self._runner.send(
                Run(
                    token=attempt.token,
                    path=attempt.script,
                    args=spec.python_args,
                    env=environment,
                    cwd=spec.cwd,
                    start_method=spec.start_method or settings.start_method,
                    python=settings.python,
                    limit_mb=spec.required_memory,
                    check_interval_seconds=settings.memory_check_interval,
                    kill_grace_seconds=settings.kill_grace,
                    timeout_seconds=spec.timeout or settings.default_timeout,
                    deadline=attempt.deadline,
                    memory_warning=spec.memory_warning,
                    oom_score_adj=settings.oom_score_adj,
                    run_as=self._account.ids if self._account else None,
                    user_env=self._account.environment if self._account else None,
                ),
                write_ends,
            )
        finally:
            for descriptor in write_ends:
                os.close(descriptor)

    def _open_stream(self, attempt: Attempt, stream: str) -> int:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_end, False)
        self._streams[read_end] = attempt, stream
        self._poll.register(read_end, select.POLLIN)
        return write_end

    def _read(self, descriptor: int) -> bool:
        """Takes in what a stream has to say; returns whether there may be more."""
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_stream(descriptor)
            return False
        attempt, stream = self._streams[descriptor]
        if attempt.output is not None:
            attempt.output.feed(stream, data)
            if attempt is self._current and self._timers.flush == NEVER and not self._timers.flushing:
                self._timers.flush = clock() + FLUSH_SECONDS
        return True

    def _close_stream(self, descriptor: int) -> None:
        del self._streams[descriptor]
        self._poll.unregister(descriptor)
        os.close(descriptor)

    def _flush(self) -> None:
        """Sends what a running job has printed: people follow it."""
        self._timers.flush = NEVER
        attempt = self._current
        if attempt is None or attempt.output is None or not attempt.output.has_news:
            return
        chunks, removed = attempt.output.take(final=False)
        removed = attempt.unremoved + removed
        chunks = without(attempt.unsent + chunks, removed)
        attempt.unsent, attempt.unremoved = [], []
        self._timers.flushing = True

        def flush() -> None:
            try:
                self._outputs.append(attempt.key, attempt.number, chunks, removed)
            except BaseException:  # known before the outcome is written, which this thread does, too
                attempt.unsent, attempt.unremoved = chunks, removed
                raise

        def flushed(answer: Any) -> None:
            self._timers.flushing = False
            if isinstance(answer, Exception):
                self._log.warning("output_delayed", job_id=attempt.job_id, attempt=attempt.number, error=answer)
            if self._current is not None and self._current.output is not None and self._current.output.has_news:
                self._timers.flush = clock() + FLUSH_SECONDS

        self._thread.submit(flush, flushed)

    # -- ending -------------------------------------------------------------------------------------------------------

    def _end(self, attempt: Attempt, ended: Ended) -> None:
        self._current = None
        self._timers.flush = self._timers.patience = NEVER
        self._pace.ended()
        attempt.ended = ended
        streams = list(self._streams)
        try:
            self._start_next()  # before anything is read or written: that goes on beside the next job
        finally:
            self._conclude(attempt, ended, streams)

    def _conclude(self, attempt: Attempt, ended: Ended, streams: list[int]) -> None:
        # No process of the job is left, so what the pipes hold is all; their end is not waited for.
        for descriptor in streams:
            while self._read(descriptor):
                pass
            if descriptor in self._streams:
                self._close_stream(descriptor)
        assert attempt.output is not None
        outcome = outcome_of(
            Ending(ended.ending),
            ended.exit_code,
            error=ended.error,
            peak_memory_mb=ended.peak_memory_mb,
            last_words=attempt.output.last_line("stderr") if ended.exit_code else "",
        )
        chunks, removed = attempt.output.take(final=True)
        self._record(attempt, outcome, chunks, removed)
        self._close_grant(attempt.grant)

    def _record(self, attempt: Attempt, outcome: Outcome, chunks: list[Chunk], removed: list[int]) -> None:
        verdict = decide(attempt.spec, attempt.counts, outcome)
        move = transitions.finish(
            attempt.key,
            attempt.token,
            outcome,
            verdict,
            attempt=attempt.number,
            ran=attempt.ran(self._server_clock),
            details=attempt.details(),
            lines=attempt.story(outcome, verdict),
        )
        self._results.append(Result(attempt, outcome, verdict, move, chunks, removed))
        if self._ahead and len(self._results) < RESULTS_TOGETHER:
            self._timers.results = min(self._timers.results, clock() + RESULTS_WAIT_SECONDS)
        else:
            self._write_results()

    def _write_results(self) -> None:
        self._timers.results = NEVER
        results, self._results = self._results, []
        if not results:
            return
        self._writing += 1

        def written(answer: Any) -> None:
            self._writing -= 1
            if isinstance(answer, Exception):
                self._log.error("results_not_kept", jobs=len(results), error=answer)
                answer = [(False, False)] * len(results)
            finished = [
                result.finished(held=held, spooled=spooled)
                for result, (held, spooled) in zip(results, answer, strict=True)
            ]
            self._supervisor.send(Finished(finished, [], self._take_operations()))

        self._thread.submit(lambda: self._write(results), written)

    def _write(self, results: list[Result]) -> list[tuple[bool, bool]]:
        """Returns for each whether the job was still ours, and whether its outcome waits on disk."""
        try:
            self._write_output(results)
        except StoreUnavailable as error:
            if not is_refusal(error):  # the outcome waits with its output: neither is written without the other
                return [self._write_alone(result, error) for result in results]
            self._log.error("output_refused", jobs=len(results), error=error)
        except Exception as error:  # what the driver cannot encode: the outcome matters more
            self._log.error("output_refused", jobs=len(results), error=error)
        try:
            held = self._store.apply_all([result.move for result in results], "finish")
            return [(each, False) for each in held]
        except StoreUnavailable as error:
            return [self._write_alone(result, error) for result in results]

    def _write_output(self, results: list[Result]) -> None:
        self._outputs.append_all(
            [(result.attempt.key, result.attempt.number, result.all_chunks()) for result in results]
        )
        for result in results:
            removed = result.attempt.unremoved + result.removed
            if removed:
                self._outputs.append(result.attempt.key, result.attempt.number, [], removed)

    def _write_alone(self, result: Result, error: StoreUnavailable) -> tuple[bool, bool]:
        attempt = result.attempt
        if is_refusal(error):
            return self._write_refused(result), False
        self._log.warning("result_spooled", job_id=attempt.job_id, attempt=attempt.number, error=error)
        while True:
            try:
                self._spool.put(attempt.token, result.spooled())
                return True, True
            except OSError as problem:
                self._log.error("spool_failed", job_id=attempt.job_id, attempt=attempt.number, error=problem)
                time.sleep(1.0)  # neither the disk nor MongoDB takes it: one of them will
                with contextlib.suppress(StoreUnavailable):
                    return self._store.apply(result.move, "finish"), False

    def _write_refused(self, result: Result) -> bool:
        """One of the results that were to be written was refused: if it is this one, its outcome alone is written."""
        attempt = result.attempt
        if self._store.was_applied(result.move):
            return True
        try:
            return self._store.apply(result.move, "finish")
        except StoreUnavailable as error:
            if not is_refusal(error):
                raise
            self._log.error("result_refused", job_id=attempt.job_id, attempt=attempt.number, error=error)
            bare = transitions.finish_bare(
                attempt.key, attempt.token, result.outcome, result.verdict, attempt=attempt.number
            )
            return self._store.apply(bare, "finish")
