"""One slot's process side: starts one job at a time, watches it, ends it, and proves that nothing of it is left.

    worker ──Run, stdout, stderr──► runner ──fork (warm) or fork and exec──► job process ──► whatever it starts
    worker ◄──Ended──────────────── runner ◄──Extend, Stop── supervisor

The runner is a subreaper: every descendant *is* the current job, and `waitpid` saying ECHILD proves that none is left
before `Ended` is sent. It makes no network call and has no thread, so nothing delays what it enforces: memory,
timeout, cancellation, and the lease's local deadline. When its worker or its supervisor dies, the socket to it closes,
and the runner ends the job and itself. When the runner is killed, the kernel kills the job's main process (parent-death
signal) and the supervisor, a subreaper too, sweeps up the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from dataclasses import dataclass, field, replace

from supervisor.execution import child
from supervisor.execution.child import Launch
from supervisor.memory.monitor import MemoryMonitor, Overrun
from supervisor.messages import Channel, ChannelClosed, Ended, Extend, Message, Ping, Pong, Run, Stop, Usage
from supervisor.processes import become_subreaper, clock, kill_descendants, reap, signal_descendants
from supervisor.states import Ending

MB = 1_048_576
USAGE_INTERVAL_SECONDS = 1.0
START_FAILED_EXIT_CODE = 127


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What jobs are forked from: its environment, and the modules it has loaded."""

    environment: dict[str, str]
    top_level_modules: frozenset[str]
    usable: bool


@dataclass(slots=True)
class Attempt:
    """The job that runs now."""

    run: Run
    warm: bool
    pid: int
    started: float
    monitor: MemoryMonitor
    ending: Ending = Ending.EXITED
    error: str | None = None
    kill_at: float | None = None
    kill_began: float | None = None
    kill_delay_seconds: float | None = None
    reported_mb: int = 0
    report_at: float = 0.0
    story: list[str] = field(default_factory=list)

    def next_look(self) -> float:
        """When something is due, on `processes.clock()`."""
        times = [self.monitor.next_look, self.run.deadline]
        if self.kill_at is not None:
            times.append(self.kill_at)
        elif self.run.timeout_seconds is not None:
            times.append(self.started + self.run.timeout_seconds)
        return min(times)


class Runner:
    """The main loop of one slot's runner."""

    def __init__(self, worker: Channel, supervisor: Channel, interpreter: Interpreter) -> None:
        self._worker = worker
        self._supervisor = supervisor
        self._interpreter = interpreter
        self._attempt: Attempt | None = None
        self._wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._errors, self._errors_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for descriptor in (worker.fileno(), supervisor.fileno(), self._wakeup):
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> Launch | None:
        """Runs jobs until the worker or the supervisor goes away. Returns in the runner with None, and in every
        job process that was forked with what it has to run: user code must not sit on top of this loop."""
        become_subreaper()
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            while True:
                launch = self._turn()
                if launch is not None:
                    return launch
        except ChannelClosed:
            kill_descendants(os.getpid())
            return None

    def _turn(self) -> Launch | None:
        for descriptor, _ in self._poll.poll(self._timeout_ms()):
            if descriptor == self._wakeup:
                self._drain_wakeups()
            else:
                channel = self._worker if descriptor == self._worker.fileno() else self._supervisor
                message, descriptors = channel.receive()
                launch = self._handle(message, descriptors)
                if launch is not None:
                    return launch
        if self._attempt is not None:
            self._watch(self._attempt)
        return None

    def _timeout_ms(self) -> float | None:
        if self._attempt is None:
            return None
        # poll() counts in whole milliseconds and rounds up, which is late enough to not spin.
        return max(0.0, (self._attempt.next_look() - clock()) * 1000)

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)

    def _handle(self, message: Message, descriptors: list[int]) -> Launch | None:
        attempt = self._attempt
        match message:
            case Run():
                return self._start(message, descriptors)
            case Extend() if attempt is not None and attempt.run.token == message.token:
                attempt.run = _with_deadline(attempt.run, message.deadline)
            case Stop() if attempt is not None and attempt.run.token == message.token:
                self._stop(attempt, Ending(message.ending), now=message.now)
            case Ping():
                self._supervisor.send(Pong())
            case _:
                pass  # about a job that has ended meanwhile
        return None

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start(self, run: Run, descriptors: list[int]) -> Launch | None:
        stdout, stderr = descriptors
        interpreter = self._interpreter
        launch = Launch(
            path=run.path,
            args=run.args,
            env={**interpreter.environment, **run.env},
            cwd=run.cwd,
            start_method=run.start_method,
            python=run.python,
        )
        story = []
        if run.start_method == "warm":
            reason = self._why_not_warm(launch)
            if reason is not None:
                launch = launch.executed()
                story.append(f"started by exec, not warm: {reason}")
        runner_pid = os.getpid()
        started = clock()
        pid = os.fork()
        if pid == 0:
            return self._enter(launch, stdout, stderr, runner_pid)
        os.close(stdout)
        os.close(stderr)
        warm = launch.start_method == "warm"
        monitor = MemoryMonitor(
            runner_pid,
            run.limit_mb * MB,
            interval=run.check_interval_seconds,
            clock=clock,
        )
        self._attempt = Attempt(
            run=run, warm=warm, pid=pid, started=started, monitor=monitor, report_at=started, story=story
        )
        return None

    def _why_not_warm(self, launch: Launch) -> str | None:
        if not self._interpreter.usable:
            return "the warm interpreter is not usable"
        return child.why_not_warm(
            launch,
            base_env=self._interpreter.environment,
            top_level_names=self._interpreter.top_level_modules,
            python=launch.python,
        )

    def _enter(self, launch: Launch, stdout: int, stderr: int, runner_pid: int) -> Launch:
        """In the new process: becomes the job, or says why it cannot."""
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            child.enter(launch, null, stdout, stderr, runner_pid=runner_pid, keep=(self._errors_end,))
            if launch.start_method == "exec":
                child.execute(launch)
            os.close(self._errors_end)
            return launch
        except BaseException as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            with contextlib.suppress(OSError):
                os.write(self._errors_end, json.dumps(f"could not be started: {reason}").encode())
            os._exit(START_FAILED_EXIT_CODE)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, attempt: Attempt) -> None:
        statuses = reap()
        if attempt.pid in statuses:
            self._finish(attempt, statuses[attempt.pid])
            return
        now = clock()
        if now >= attempt.monitor.next_look:
            overrun = attempt.monitor.look(now)
            if overrun is not None:
                self._exceeded(attempt, overrun, now)
                return
            self._report_usage(attempt, now)
        if now >= attempt.run.deadline:
            attempt.error = "stopped: its lease could not be renewed in time"
            self._kill(attempt, Ending.LEASE_ENDED, now)
        elif attempt.kill_at is not None:
            if now >= attempt.kill_at:
                self._kill(attempt, attempt.ending, now)
        elif attempt.run.timeout_seconds is not None and now >= attempt.started + attempt.run.timeout_seconds:
            attempt.error = f"ran longer than its timeout of {attempt.run.timeout_seconds:g} s"
            self._stop(attempt, Ending.TIMEOUT, now=False)

    def _exceeded(self, attempt: Attempt, overrun: Overrun, now: float) -> None:
        used_mb = max(-(-overrun.used // MB), attempt.run.limit_mb + 1)
        attempt.error = f"used {used_mb} MB of the {attempt.run.limit_mb} MB in required_memory"
        attempt.story += [
            f"memory: {share.bytes / MB:.0f} MB in process {share.pid} ({share.command})"
            for share in overrun.processes
        ]
        self._kill(attempt, Ending.MEMORY_EXCEEDED, now)

    def _stop(self, attempt: Attempt, ending: Ending, *, now: bool) -> None:
        """SIGTERM to all of the job, SIGKILL after its grace. The first reason to stop is the one that counts."""
        if attempt.kill_at is None:
            attempt.ending = ending
            attempt.kill_at = clock() + attempt.run.kill_grace_seconds
            signal_descendants(os.getpid(), signal.SIGTERM)
            signal_descendants(os.getpid(), signal.SIGCONT)
        if now:
            self._kill(attempt, attempt.ending, clock())

    def _kill(self, attempt: Attempt, ending: Ending, began: float) -> None:
        attempt.ending = ending
        attempt.kill_began = began
        report = kill_descendants(os.getpid())
        attempt.kill_delay_seconds = clock() - began
        self._finish(attempt, report.statuses.get(attempt.pid))

    def _finish(self, attempt: Attempt, exit_code: int | None) -> None:
        """The main process has ended: what it left behind ends with it, and only then the job is over."""
        ended = clock()
        leftovers = kill_descendants(os.getpid()).killed
        self._attempt = None
        attempt.monitor.close()
        if exit_code == START_FAILED_EXIT_CODE:
            error = self._start_error()
            if error is not None:
                attempt.ending, attempt.error, exit_code = Ending.START_FAILED, error, None
        peak = attempt.monitor.peak
        self._worker.send(
            Ended(
                token=attempt.run.token,
                ending=attempt.ending.value,
                exit_code=exit_code,
                error=attempt.error,
                duration_seconds=ended - attempt.started,
                peak_memory_mb=-(-peak // MB) if peak else None,
                kill_delay_seconds=attempt.kill_delay_seconds,
                leftovers=leftovers,
                story=attempt.story,
                samples=[(round(seconds, 3), used // MB) for seconds, used in attempt.monitor.series()],
            )
        )

    def _start_error(self) -> str | None:
        with contextlib.suppress(BlockingIOError):
            text: str = json.loads(os.read(self._errors, 65_536))
            return text
        return None

    def _report_usage(self, attempt: Attempt, now: float) -> None:
        used_mb = -(-attempt.monitor.used // MB)
        if now >= attempt.report_at and used_mb != attempt.reported_mb:
            attempt.reported_mb, attempt.report_at = used_mb, now + USAGE_INTERVAL_SECONDS
            self._supervisor.send(Usage(attempt.run.token, used_mb))


def _with_deadline(run: Run, deadline: float) -> Run:
    return replace(run, deadline=deadline)
