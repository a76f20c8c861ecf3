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
import selectors
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

from supervisor.errors import InvalidJob, StoreUnavailable
from supervisor.events import Logger, logger
from supervisor.execution.task_roots import check_working_directory, resolve_script
from supervisor.job import Counts, JobSpec, Outcome, Verdict, decide, outcome_of
from supervisor.messages import (
    Admit,
    Channel,
    ChannelClosed,
    Claim,
    Claimed,
    Ended,
    Finished,
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
from supervisor.settings import Settings
from supervisor.spool import Spool
from supervisor.states import Ending, Reason
from supervisor.store import transitions
from supervisor.store.jobs import JobStore, cannot_be_locked
from supervisor.store.output import OutputStore
from supervisor.store.transitions import Demand, Owner

FLUSH_SECONDS = 1.0
READ_BYTES = 65_536
MB = 1_048_576
SAMPLES_KEPT = 64


def lease_margin(lease_seconds: float) -> float:
    """How long before its end a lease stops being relied on: time enough to kill everything."""
    return min(2.0, lease_seconds * 0.2)


@dataclass(slots=True)
class Attempt:
    """A job that this worker holds."""

    document: dict[str, Any]
    token: str
    deadline: float
    spec: JobSpec | None = None
    counts: Counts = field(default_factory=Counts)
    script: str = ""
    output: OutputCapture | None = None
    ended: Ended | None = None

    @property
    def job_id(self) -> str:
        return str(self.document["_id"])

    @property
    def number(self) -> int:
        return self.counts.attempts


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
        self._spool = spool
        self._log = log or logger("worker")
        self._operations: list[Operation] = []
        self._store = open_store(lambda *operation: self._operations.append(operation))
        self._outputs = OutputStore(self._store)
        self._thread = StoreThread()
        self._selector = selectors.DefaultSelector()
        self._streams: dict[int, str] = {}
        self._attempt: Attempt | None = None
        self._waiting: Attempt | None = None
        self._unfinished = 0
        self._claiming = False
        self._retiring = False
        self._flush_at: float | None = None
        self._flushing = False

    def run(self) -> int:
        """Works until it is retired or one of its neighbours is gone; returns the exit code."""
        for descriptor in (self._supervisor.fileno(), self._runner.fileno(), self._thread.wakeup):
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._supervisor.send(WorkerReady(self._owner.worker))
        try:
            while not (self._retiring and self._is_idle()):
                self._turn()
            return 0
        except ChannelClosed:
            return 1
        finally:
            self._thread.finish(timeout_seconds=10.0)
            with contextlib.suppress(ChannelClosed):
                self._thread.deliver()

    def _is_idle(self) -> bool:
        return self._attempt is None and self._waiting is None and not self._claiming and self._unfinished == 0

    def _turn(self) -> None:
        timeout = None if self._flush_at is None else max(0.0, self._flush_at - clock())
        for key, _ in self._selector.select(timeout):
            descriptor = key.fd
            if descriptor in self._streams:
                self._read(descriptor)
            elif descriptor == self._thread.wakeup:
                self._thread.deliver()
            elif descriptor == self._runner.fileno():
                self._handle(self._runner.receive()[0])
            elif descriptor == self._supervisor.fileno():
                self._handle(self._supervisor.receive()[0])
        if self._flush_at is not None and clock() >= self._flush_at:
            self._flush()

    def _handle(self, message: Message) -> None:
        match message:
            case Claim():
                self._claim(message)
            case Admit() if self._waiting is not None and self._waiting.token == message.token:
                attempt, self._waiting = self._waiting, None
                self._start(attempt)
            case Refuse() if self._waiting is not None and self._waiting.token == message.token:
                attempt, self._waiting = self._waiting, None
                self._give_back(attempt)
            case Ended() if self._attempt is not None and self._attempt.token == message.token:
                self._end(self._attempt, message)
            case Ping():
                self._supervisor.send(Pong())
            case Retire():
                self._retiring = True
            case _:
                pass  # about a job that has ended meanwhile

    def _take_operations(self) -> list[Operation]:
        operations, self._operations = self._operations, []
        return operations

    # -- claiming -----------------------------------------------------------------------------------------------------

    def _claim(self, claim: Claim) -> None:
        if self._retiring:
            self._supervisor.send(NothingDue([]))
            return
        self._claiming = True
        token = secrets.token_hex(12)
        sent = clock()
        deadline = sent + self._settings.lease_seconds - lease_margin(self._settings.lease_seconds)
        demand = Demand(queues=self._settings.queues, limit_mb=claim.limit_mb)

        def claimed(answer: Any) -> None:
            self._claiming = False
            if isinstance(answer, Exception):
                self._supervisor.send(NothingDue(self._take_operations(), error=str(answer)))
            elif answer is None:
                self._supervisor.send(NothingDue(self._take_operations()))
            else:
                self._take_up(Attempt(answer, token, deadline, counts=Counts.from_document(answer)), claim)

        self._thread.submit(lambda: self._claim_or_find(token, demand), claimed)

    def _claim_or_find(self, token: str, demand: Demand) -> dict[str, Any] | None:
        """A claim whose answer was lost may have been applied: it is looked up before anything else is claimed."""
        lease = self._settings.lease_seconds
        try:
            return self._store.claim(self._owner, token, demand, lease)
        except StoreUnavailable as error:
            if cannot_be_locked(error):
                self._store.refuse_unclaimable(demand, f"document: MongoDB cannot lock it: {error.__cause__}"[:500])
                return None
            with contextlib.suppress(StoreUnavailable):
                return self._store.claimed_with(token)
            raise

    def _take_up(self, attempt: Attempt, claim: Claim) -> None:
        document = attempt.document
        try:
            attempt.spec = JobSpec.from_document(document)
            check_working_directory(attempt.spec.cwd)
            attempt.script = resolve_script(attempt.spec.python_path, self._settings.roots, attempt.spec.cwd)
        except InvalidJob as error:
            self._announce(attempt, memory_mb=0, waits=False)
            self._record(attempt, Outcome(reason=Reason.INVALID_JOB, error=str(error)), [])
            self._supervisor.send(Released(attempt.token))
            return
        waits = attempt.spec.required_memory > claim.sure_mb
        self._announce(attempt, memory_mb=attempt.spec.required_memory, waits=waits)
        if waits:
            self._waiting = attempt
        else:
            self._start(attempt)

    def _announce(self, attempt: Attempt, *, memory_mb: int, waits: bool) -> None:
        document = attempt.document
        queue = document.get("queue")
        self._supervisor.send(
            Claimed(
                token=attempt.token,
                job_id=attempt.job_id,
                attempt=attempt.number,
                queue=queue if isinstance(queue, str) else "default",
                memory_mb=memory_mb,
                wait_seconds=_waited(document),
                waits=waits,
                operations=self._take_operations(),
            )
        )

    def _give_back(self, attempt: Attempt) -> None:
        move = transitions.give_back(attempt.document["_id"], attempt.token)
        self._unfinished += 1

        def given(answer: Any) -> None:
            self._unfinished -= 1
            self._supervisor.send(Released(attempt.token))

        self._thread.submit(lambda: self._store.apply(move, "give_back"), given)

    # -- running ------------------------------------------------------------------------------------------------------

    def _start(self, attempt: Attempt) -> None:
        assert attempt.spec is not None
        spec, settings = attempt.spec, self._settings
        attempt.output = OutputCapture(round(settings.log_limit * MB))
        self._attempt = attempt
        write_ends = [self._open_stream("stdout"), self._open_stream("stderr")]
        environment = {
            **spec.env,
            "JOB_ID": attempt.job_id,
            "JOB_ATTEMPT": str(attempt.number),
            "JOB_REQUIRED_MEMORY": str(spec.required_memory),
        }
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
                ),
                write_ends,
            )
        finally:
            for descriptor in write_ends:
                os.close(descriptor)

    def _open_stream(self, stream: str) -> int:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_end, False)
        self._streams[read_end] = stream
        self._selector.register(read_end, selectors.EVENT_READ)
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
        if self._attempt is not None and self._attempt.output is not None:
            self._attempt.output.feed(self._streams[descriptor], data)
            if self._flush_at is None and not self._flushing:
                self._flush_at = clock() + FLUSH_SECONDS
        return True

    def _close_stream(self, descriptor: int) -> None:
        del self._streams[descriptor]
        self._selector.unregister(descriptor)
        os.close(descriptor)

    def _flush(self) -> None:
        """Sends what a running job has printed: people follow it."""
        self._flush_at = None
        attempt = self._attempt
        if attempt is None or attempt.output is None or not attempt.output.has_news:
            return
        chunks, removed = attempt.output.take(final=False)
        self._flushing = True

        def flushed(answer: Any) -> None:
            self._flushing = False
            if isinstance(answer, Exception):
                self._log.warning("output_not_stored", job_id=attempt.job_id, error=answer)
            if self._attempt is not None and self._attempt.output is not None and self._attempt.output.has_news:
                self._flush_at = clock() + FLUSH_SECONDS

        self._thread.submit(
            lambda: self._outputs.append(attempt.document["_id"], attempt.number, chunks, removed), flushed
        )

    # -- ending -------------------------------------------------------------------------------------------------------

    def _end(self, attempt: Attempt, ended: Ended) -> None:
        # No process of the job is left, so what the pipes hold is all; their end is not waited for.
        for descriptor in list(self._streams):
            while self._read(descriptor):
                pass
            if descriptor in self._streams:
                self._close_stream(descriptor)
        self._attempt, self._flush_at = None, None
        attempt.ended = ended
        assert attempt.output is not None
        outcome = outcome_of(
            Ending(ended.ending),
            ended.exit_code,
            error=ended.error,
            peak_memory_mb=ended.peak_memory_mb,
            last_words=attempt.output.last_line("stderr"),
        )
        chunks, removed = attempt.output.take(final=True)
        self._record(attempt, outcome, chunks, removed)
        self._supervisor.send(Released(attempt.token))

    def _record(self, attempt: Attempt, outcome: Outcome, chunks: list[Chunk], removed: list[int] | None = None) -> None:
        verdict = decide(attempt.spec, attempt.counts, outcome)
        details = _details(attempt.ended)
        lines = _story(attempt, outcome, verdict)
        move = transitions.finish(attempt.document["_id"], attempt.token, outcome, verdict, details, lines)
        self._unfinished += 1

        def write() -> tuple[bool, bool]:
            """Returns whether the job was still ours, and whether the outcome waits on disk."""
            if chunks or removed:
                try:
                    self._outputs.append(attempt.document["_id"], attempt.number, chunks, removed or ())
                except StoreUnavailable as error:
                    self._log.warning("output_not_stored", job_id=attempt.job_id, error=error)
            try:
                return self._store.finish(attempt.document["_id"], attempt.token, move), False
            except StoreUnavailable as error:
                self._log.warning("result_spooled", job_id=attempt.job_id, attempt=attempt.number, error=error)
                self._spool.put(attempt.token, spooled_move(move, attempt, chunks))
                return True, True

        def written(answer: Any) -> None:
            self._unfinished -= 1
            if isinstance(answer, Exception):
                self._log.error("result_not_kept", job_id=attempt.job_id, attempt=attempt.number, error=answer)
                answer = (False, False)
            held, spooled = answer
            self._supervisor.send(self._finished(attempt, outcome, verdict, held=held, spooled=spooled))

        self._thread.submit(write, written)

    def _finished(
        self, attempt: Attempt, outcome: Outcome, verdict: Verdict, *, held: bool, spooled: bool
    ) -> Finished:
        ended = attempt.ended
        return Finished(
            token=attempt.token,
            job_id=attempt.job_id,
            attempt=attempt.number,
            status=verdict.status.value,
            reason=outcome.reason.value if outcome.reason else None,
            error=outcome.error,
            exit_code=outcome.exit_code,
            duration_seconds=ended.duration_seconds if ended else 0.0,
            peak_memory_mb=outcome.peak_memory_mb,
            kill_delay_seconds=ended.kill_delay_seconds if ended else None,
            held=held,
            spooled=spooled,
            operations=self._take_operations(),
        )


def _waited(document: Mapping[str, Any]) -> float:
    """Seconds from when the job was due to its claim, both on the server's clock."""
    try:
        waited: float = (document["lock"]["locked_at"] - document["scheduled_date"]).total_seconds()
        return max(0.0, waited)
    except (KeyError, TypeError):
        return 0.0


def _details(ended: Ended | None) -> dict[str, Any]:
    if ended is None:
        return {}
    details: dict[str, Any] = {"duration_seconds": round(ended.duration_seconds, 3)}
    if len(ended.samples) > 1:
        details["memory_samples"] = [list(sample) for sample in ended.samples[-SAMPLES_KEPT:]]
    return details


def _story(attempt: Attempt, outcome: Outcome, verdict: Verdict) -> list[str]:
    """The lines of the job's log about this attempt: how it ended, what it printed."""
    lines: list[str] = []
    ended = attempt.ended
    if ended is not None:
        lines += ended.story
        facts = [f"after {ended.duration_seconds:.2f} s"]
        if outcome.exit_code is not None:
            facts.append(f"exit code {outcome.exit_code}")
        if outcome.peak_memory_mb is not None:
            facts.append(f"peak memory {outcome.peak_memory_mb} MB")
        if ended.leftovers:
            facts.append(f"ended {ended.leftovers} processes that it had left running")
        lines.append(f"{verdict.note} ({', '.join(facts)})")
    else:
        lines.append(verdict.note)
    if attempt.output is not None:
        lines += attempt.output.blocks()
    return lines


def spooled_move(move: transitions.Move, attempt: Attempt, chunks: list[Chunk]) -> dict[str, Any]:
    """The record of an outcome that waits on disk. The id travels with the token: it need not be JSON."""
    update = [dict(stage) for stage in move.update]
    return {
        "token": attempt.token,
        "job_id": attempt.job_id,
        "attempt": attempt.number,
        "update": update,
        "chunks": [
            {**dataclasses.asdict(chunk), "data": chunk.data.decode("latin-1")} for chunk in chunks[-256:]
        ],
    }


def ignore_terminal_signals() -> None:
    """Signals are the supervisor's business: Ctrl-C reaches the whole foreground group."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
