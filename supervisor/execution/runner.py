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
import sys
import time
from dataclasses import dataclass, field, replace
from typing import NoReturn

from supervisor.execution import child
from supervisor.execution.child import Launch
from supervisor.execution.isolation import INIT_PID, Isolation, main_process, signal_main_process
from supervisor.execution.relief import Relief
from supervisor.execution.spare import Spare, fork_spare
from supervisor.memory.cgroup import SlotGroup, hard_limit_mb
from supervisor.memory.monitor import MemoryMonitor, Overrun
from supervisor.messages import (
    Channel,
    ChannelClosed,
    ChannelFull,
    Ended,
    Extend,
    Message,
    Ping,
    Pong,
    Run,
    Stop,
    Usage,
    decode,
    encode,
)
from supervisor.processes import (
    become_subreaper,
    clock,
    collect,
    descendants,
    has_pending_signal,
    kill_descendants,
    process_stat,
    resident_bytes,
    run_before_others,
    set_oom_score_adj,
    signal_descendants,
)
from supervisor.states import Ending

MB = 1_048_576
USAGE_INTERVAL_SECONDS = 1.0
FIRST_LOOK_SECONDS = 0.01
REST_SECONDS = 5.0
"""How often a job is looked at that somebody else watches."""
SPARE_AFTER_SECONDS = 0.02
"""A runner that was idle for this long forks ahead; with a backlog, forking ahead wins nothing."""
HEAD_START_MS = 5
"""How long a new job has the processor to itself before the runner does anything that can wait."""
WARN_SHARE = 0.9
TRACEBACK_SECONDS = 0.005
"""The kill waits no longer for a traceback."""
START_FAILED_EXIT_CODE = 127


_REHEARSAL = Run(
    token="rehearsal",
    path=__file__,
    args=["argument"],
    env={"JOB_ID": "rehearsal", "JOB_ATTEMPT": "1", "JOB_REQUIRED_MEMORY": "128"},
    cwd=None,
    start_method="warm",
    python=sys.executable,
    limit_mb=128,
    check_interval_seconds=0.1,
    kill_grace_seconds=5.0,
    timeout_seconds=None,
    deadline=0.0,
)


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What jobs are forked from: its environment, and the modules it has loaded."""

    environment: dict[str, str]
    top_level_modules: frozenset[str]
    usable: bool
    isolated: bool = False
    """Whether each job gets a PID namespace of its own."""
    memory_groups: str | None = None
    """What the paths of the slots' control groups begin with; None: memory is watched by sampling alone."""
    lookout: int | None = None
    """The descriptor of the socket to the lookout."""


@dataclass(slots=True)
class Attempt:
    """The job that runs now."""

    run: Run
    warm: bool
    pid: int
    started: float
    first_look: float
    """Most jobs of a backlog have ended before it, and are never watched."""
    monitor: MemoryMonitor | None = None
    ending: Ending = Ending.EXITED
    error: str | None = None
    kill_at: float | None = None
    kill_began: float | None = None
    kill_delay_seconds: float | None = None
    reported_mb: int = 0
    report_at: float = 0.0
    warned: bool = False
    stopped_at_mb: int = 0
    """The hard limit, if the kernel ended the job there."""
    story: list[str] = field(default_factory=list)

    def next_look(self) -> float:
        """When something is due, on `processes.clock()`."""
        look = self.monitor.next_look if self.monitor is not None else self.first_look
        times = [look, self.run.deadline]
        if self.kill_at is not None:
            times.append(self.kill_at)
        elif self.run.timeout_seconds is not None:
            times.append(self.started + self.run.timeout_seconds)
        return min(times)


class Runner:
    """The main loop of one slot's runner."""

    def __init__(self, worker: Channel, supervisor: Channel, interpreter: Interpreter, slot: int = 0) -> None:
        self._worker = worker
        self._supervisor = supervisor
        self._interpreter = interpreter
        self._attempt: Attempt | None = None
        self._spare: Spare | None = None
        self._handed_over: Launch | None = None
        """What the last spare became."""
        self._shown: Launch | None = None
        """Whose command line this process shows: among short jobs it is not worth while to take it back."""
        self._isolation = Isolation() if interpreter.isolated else None
        groups = interpreter.memory_groups
        self._group = SlotGroup(f"{groups}-{slot}") if groups is not None else None
        self._relief = Relief(interpreter.lookout) if interpreter.lookout is not None else None
        child.keep(self)
        self._own_rss = resident_bytes(os.getpid())
        self._wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._errors, self._errors_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for descriptor in (worker.fileno(), supervisor.fileno(), self._wakeup):
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> Launch | None:
        """Runs jobs until the worker or the supervisor goes away. Returns in the runner with None, and in every
        job process that was forked with what it has to run: user code must not sit on top of this loop."""
        become_subreaper()
        run_before_others()
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
            if self._group is not None:
                self._group.remove()
            return None

    def _turn(self) -> Launch | None:
        events = self._poll.poll(self._timeout_ms())
        if not events and self._attempt is None:
            return self._fork_spare()
        for descriptor, _ in events:
            if descriptor == self._wakeup:
                self._drain_wakeups()
            elif descriptor == self._worker.fileno() or descriptor == self._supervisor.fileno():
                channel = self._worker if descriptor == self._worker.fileno() else self._supervisor
                message, descriptors = channel.receive()
                launch = self._handle(message, descriptors)
                if launch is not None:
                    return launch
            else:
                self._hear_lookout(descriptor)
        if self._attempt is not None:
            self._watch(self._attempt)
        elif self._spare is not None and self._spare.pid in collect().exit_codes:
            self._spare.dismiss()
            self._spare = None
        return None

    def _timeout_ms(self) -> float | None:
        if self._attempt is None:
            return SPARE_AFTER_SECONDS * 1000 if self._spare is None and self._isolation is None else None
        # poll() counts in whole milliseconds and rounds up, which is late enough to not spin.
        return max(0.0, (self._attempt.next_look() - clock()) * 1000)

    def _drain_wakeups(self) -> None:
        try:  # noqa: SIM105 - suppress() lies on pages of its own, to be copied after every fork
            os.read(self._wakeup, 4096)
        except BlockingIOError:
            pass

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
        if clock() >= run.deadline:  # somebody else may run it by now
            self._refuse(run, descriptors, Ending.LEASE_ENDED, "its lease ended before it was started")
            return None
        launch = self._launch_of(run)
        story = []
        if run.start_method == "warm":
            reason = self._why_not_warm(launch, run.user_env or {})
            if reason is not None:
                launch = launch.executed()
                story.append(f"started by exec, not warm: {reason}")
        if self._group is not None:
            self._limit_memory(self._group, run.limit_mb, story)
        runner_pid = os.getpid()
        started = clock()
        pid = self._use_spare(launch, stdout, stderr)
        if pid == 0:
            prepared = child.before_fork(launch)
            try:
                pid = self._fork()
            except OSError as error:  # no process is left
                child.after_fork(prepared)
                self._refuse(run, descriptors, Ending.START_FAILED, f"could not be started: fork: {error.strerror}")
                return None
            if pid == 0:
                return self._enter(prepared, stdout, stderr, runner_pid)
            # What is written from here on must be copied as long as the job has the same pages: many jobs end first.
            if self._poll.poll(HEAD_START_MS) and self._isolation is None:
                self._shown = prepared
            else:
                child.after_fork(prepared)
        os.close(stdout)
        os.close(stderr)
        first_look = started + min(FIRST_LOOK_SECONDS, run.check_interval_seconds)
        self._attempt = attempt = Attempt(run, launch.start_method == "warm", pid, started, first_look)
        attempt.report_at, attempt.story = started, story
        return None

    def _launch_of(self, run: Run) -> Launch:
        env = run.env if run.user_env is None else {**self._interpreter.environment, **run.user_env, **run.env}
        # Not by keywords, here and in `_start`: each would be another page to write to, and to copy after a fork.
        launch = Launch(run.path, run.args, env, run.cwd, run.start_method, run.python, run.run_as)
        launch.adds = run.user_env is None
        return launch

    def _refuse(self, run: Run, descriptors: list[int], ending: Ending, error: str) -> None:
        """Ends an attempt that never had a process."""
        for descriptor in descriptors:
            os.close(descriptor)
        self._worker.send(Ended(run.token, ending.value, None, error, 0.0, None, None, 0, [], []))

    def _limit_memory(self, group: SlotGroup, limit_mb: int, story: list[str]) -> None:
        try:
            group.limit(limit_mb)
        except OSError as error:
            story.append(f"memory: watched only, the hard limit could not be set: {error.strerror}: {error.filename}")

    def _fork(self) -> int:
        """0 in the job. The process that is known to the runner may be the job's `init`."""
        if self._isolation is None:
            return os.fork()
        runner_pid = os.getpid()
        try:
            return self._isolation.fork()
        except OSError as error:
            pid = os.fork() if os.getpid() == runner_pid else 0
            if pid == 0:
                self._cannot_start(error)
            return pid

    def _use_spare(self, launch: Launch, stdout: int, stderr: int) -> int:
        """The process id of the spare that has become the job; 0 without one."""
        spare, self._spare = self._spare, None
        if spare is None:
            return 0
        if spare.start(launch, stdout, stderr):
            self._handed_over = launch
            return spare.pid
        kill_descendants(os.getpid())
        return 0

    def _fork_spare(self) -> Launch | None:
        """While nothing is to be done, the next job's process is forked."""
        self._take_title_back()
        runner_pid = os.getpid()
        if self._handed_over is not None:
            child.keep_compiled(self._handed_over)
            self._handed_over = None
        try:
            forked = fork_spare()
        except OSError:  # no process is left: there may be one when the next job comes
            return None
        if isinstance(forked, Spare):
            self._spare = forked
            self._rehearse(forked)
            return None
        stdout, stderr = forked.descriptors
        return self._enter(forked.launch, stdout, stderr, runner_pid)

    def _take_title_back(self) -> None:
        if self._shown is not None:
            child.after_fork(self._shown)
            self._shown = None

    def _rehearse(self, spare: Spare) -> None:
        """Goes through what the next start does first, while nothing is to be done."""
        message = decode(encode(_REHEARSAL))
        assert isinstance(message, Run)
        launch = self._launch_of(message)
        self._why_not_warm(launch, {})
        spare.rehearse(launch)

    def _why_not_warm(self, launch: Launch, user_env: dict[str, str]) -> str | None:
        """The user's HOME is no reason: root must not load what that user keeps there."""
        if not self._interpreter.usable:
            return "the warm interpreter is not usable"
        return child.why_not_warm(
            launch,
            base_env={**self._interpreter.environment, **user_env} if user_env else self._interpreter.environment,
            top_level_names=self._interpreter.top_level_modules,
            python=launch.python,
        )

    def _enter(self, launch: Launch, stdout: int, stderr: int, runner_pid: int) -> Launch:
        """In the new process: becomes the job, or says why it cannot."""
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            if self._group is not None:
                self._group.join()
            parent_pid = runner_pid if self._isolation is None else INIT_PID
            child.enter(launch, null, stdout, stderr, runner_pid=parent_pid, kept_fd=self._errors_end)
            if launch.start_method == "exec":
                child.execute(launch)
            os.close(self._errors_end)
            return launch
        except BaseException as error:
            self._cannot_start(error)

    def _cannot_start(self, error: BaseException) -> NoReturn:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{reason}: {os.fsdecode(error.filename)}"
        with contextlib.suppress(OSError):
            os.write(self._errors_end, json.dumps(f"could not be started: {reason}").encode())
        os._exit(START_FAILED_EXIT_CODE)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, attempt: Attempt) -> None:
        ended = collect()
        if attempt.pid in ended.exit_codes:
            peak = ended.peak_rss_bytes[attempt.pid]
            self._finish(attempt, ended.exit_codes[attempt.pid], alone=ended.none_left, peak_rss=peak)
            return
        now = clock()
        if self._is_time_to_look(attempt, now) and not self._look(attempt, now):
            return
        if now >= attempt.run.deadline:
            attempt.error = "stopped: its lease could not be renewed in time"
            self._kill(attempt, Ending.LEASE_ENDED, now)
        elif attempt.kill_at is not None:
            if now >= attempt.kill_at:
                self._kill(attempt, attempt.ending, now)
        elif attempt.run.timeout_seconds is not None and now >= attempt.started + attempt.run.timeout_seconds:
            attempt.error = f"ran longer than its timeout of {attempt.run.timeout_seconds:g} s"
            self._stop(attempt, Ending.TIMEOUT, now=False)

    def _is_time_to_look(self, attempt: Attempt, now: float) -> bool:
        if attempt.monitor is not None:
            return now >= attempt.monitor.next_look
        if now < attempt.first_look:
            return False
        run = attempt.run
        self._take_title_back()
        # A job's `init` is a fork of the runner and shares with the job what the runner does.
        root = os.getpid() if self._isolation is None else attempt.pid
        attempt.monitor = MemoryMonitor(root, run.limit_mb * MB, interval=run.check_interval_seconds, clock=clock)
        for pid in descendants(os.getpid()):
            set_oom_score_adj(run.oom_score_adj, pid)  # its children inherit it
        return True

    def _look(self, attempt: Attempt, now: float) -> bool:
        """Whether the job may go on."""
        monitor = attempt.monitor
        assert monitor is not None
        overrun = monitor.look(now)
        if overrun is not None:
            self._exceeded(attempt, overrun, now)
            return False
        if attempt.run.memory_warning and not attempt.warned and monitor.used >= WARN_SHARE * monitor.limit:
            self._warn(attempt, monitor.used)
        self._report_usage(attempt, monitor.used, now)
        self._rest(monitor, now)
        return True

    def _rest(self, monitor: MemoryMonitor, now: float) -> None:
        """Hands a job at rest to the lookout."""
        relief = self._relief
        if relief is None:
            return
        if relief.watches:
            monitor.next_look = now + REST_SECONDS
        elif relief.may_take(now):
            rest = monitor.at_rest()
            if rest is not None and relief.hand_over(rest, now):
                self._poll.register(relief.fileno(), select.POLLIN)

    def _hear_lookout(self, descriptor: int) -> None:
        relief, attempt = self._relief, self._attempt
        if relief is None or descriptor != relief.fileno():
            return  # of a job that has ended meanwhile
        now = clock()
        relief.hear(now)
        if not relief.watches:
            self._poll.unregister(descriptor)
        if attempt is not None and attempt.monitor is not None:
            attempt.monitor.next_look = now + REST_SECONDS if relief.watches else now

    def _end_relief(self) -> None:
        if self._relief is not None and self._relief.fileno() >= 0:
            self._poll.unregister(self._relief.fileno())
            self._relief.end()

    def _warn(self, attempt: Attempt, used: int) -> None:
        """Once, so that the job can write a checkpoint before it is killed."""
        attempt.warned = True
        after = clock() - attempt.started
        attempt.story.append(
            f"after {after:.1f} s: used {used // MB} MB of {attempt.run.limit_mb} MB, warned by SIGUSR1, as it asked"
        )
        self._signal_main(attempt, signal.SIGUSR1)

    def _signal_main(self, attempt: Attempt, number: int) -> None:
        if self._isolation is not None:
            signal_main_process(attempt.pid, number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempt.pid, number)  # our child, and not reaped: its id is its own

    def _dump_traceback(self, attempt: Attempt) -> None:
        """Has a warm job write where its threads are to its standard error, and gives it a moment to do so."""
        pid = attempt.pid if self._isolation is None else main_process(attempt.pid)
        ours, theirs = process_stat(os.getpid()), process_stat(pid) if pid is not None else None
        if not attempt.warm or ours is None or theirs is None or theirs.image != ours.image or theirs.ended:
            return  # another program by now: the signal would end it
        self._signal_main(attempt, child.TRACEBACK_SIGNAL)
        attempt.story.append("asked where its threads are: the answer ends its standard error, if it could write it")
        give_up = clock() + TRACEBACK_SECONDS
        while clock() < give_up and has_pending_signal(theirs.pid, child.TRACEBACK_SIGNAL):
            time.sleep(0.0005)
        time.sleep(0.001)  # the handler has begun; it needs some 100 µs

    def _exceeded(self, attempt: Attempt, overrun: Overrun, now: float) -> None:
        used_mb = max(-(-overrun.used // MB), attempt.run.limit_mb + 1)
        attempt.error = f"used {used_mb} MB of the {attempt.run.limit_mb} MB in required_memory"
        attempt.story += [
            f"memory: {share.bytes / MB:.1f} MB in process {share.pid} ({share.command})" for share in overrun.processes
        ]
        if overrun.count > len(overrun.processes):
            attempt.story.append(f"memory: and {overrun.count - len(overrun.processes)} more processes")
        self._dump_traceback(attempt)
        self._kill(attempt, Ending.MEMORY_EXCEEDED, now)

    def _stop(self, attempt: Attempt, ending: Ending, *, now: bool) -> None:
        """SIGTERM to all of the job, SIGKILL after its grace. The first reason to stop is the one that counts."""
        if attempt.kill_at is None:
            attempt.ending = ending
            attempt.kill_at = clock() + attempt.run.kill_grace_seconds
            if ending is Ending.TIMEOUT:
                self._dump_traceback(attempt)
            signal_descendants(os.getpid(), signal.SIGTERM)
            signal_descendants(os.getpid(), signal.SIGCONT)
        if now:
            self._kill(attempt, attempt.ending, clock())

    def _kill(self, attempt: Attempt, ending: Ending, began: float) -> None:
        attempt.ending = ending
        attempt.kill_began = began
        report = kill_descendants(os.getpid())
        exit_codes = report.statuses
        while not report.complete:  # stuck in the kernel: the job is not over before it is gone
            report = kill_descendants(os.getpid())
            exit_codes = {**exit_codes, **report.statuses}
        attempt.kill_delay_seconds = clock() - began
        self._finish(attempt, exit_codes.get(attempt.pid), alone=True)

    def _finish(self, attempt: Attempt, exit_code: int | None, *, alone: bool, peak_rss: int = 0) -> None:
        """The main process has ended: what it left behind ends with it, and only then the job is over."""
        ended = clock()
        leftovers = 0 if alone else kill_descendants(os.getpid()).killed
        if self._isolation is not None:
            exit_code, leftovers = self._isolation.outcome(exit_code)
        self._attempt = None
        if self._group is not None and exit_code == -signal.SIGKILL and attempt.ending is Ending.EXITED:
            self._judge_kill(attempt, self._group)
        if exit_code == START_FAILED_EXIT_CODE:
            error = self._start_error()
            if error is not None:
                attempt.ending, attempt.error, exit_code = Ending.START_FAILED, error, None
        self._worker.send(
            Ended(
                attempt.run.token,
                attempt.ending._value_,  # what `value` gives by way of two functions
                exit_code,
                attempt.error,
                ended - attempt.started,
                None if exit_code is None else self._peak_mb(attempt, peak_rss),
                attempt.kill_delay_seconds,
                leftovers,
                attempt.story,
                self._samples(attempt),
                attempt.started,
                clock(),
            )
        )
        if attempt.monitor is not None:
            attempt.monitor.close()
            self._end_relief()
        if self._group is not None:
            with contextlib.suppress(OSError, ValueError):
                self._group.clear()

    def _judge_kill(self, attempt: Attempt, group: SlotGroup) -> None:
        """Somebody killed the job: was it the kernel, because of its memory?"""
        with contextlib.suppress(OSError):
            if group.has_killed():
                limit_mb = attempt.run.limit_mb
                attempt.ending, attempt.stopped_at_mb = Ending.MEMORY_EXCEEDED, hard_limit_mb(limit_mb)
                attempt.error = (
                    f"used {attempt.stopped_at_mb} MB of the {limit_mb} MB in required_memory: "
                    "ended by the kernel at the hard limit of its control group"
                )

    def _peak_mb(self, attempt: Attempt, peak_rss: int) -> int:
        """A job that ended before the first look is judged by what the kernel counted beyond what it inherited."""
        if attempt.stopped_at_mb:
            return attempt.stopped_at_mb
        if attempt.monitor is not None and attempt.monitor.peak:
            return -(-attempt.monitor.peak // MB)
        return max(1, -(-(peak_rss - self._own_rss) // MB))

    def _samples(self, attempt: Attempt) -> list[tuple[float, int]]:
        if attempt.monitor is None:
            return []
        return [(round(seconds, 3), used // MB) for seconds, used in attempt.monitor.series()]

    def _start_error(self) -> str | None:
        with contextlib.suppress(BlockingIOError):
            text: str = json.loads(os.read(self._errors, 65_536))
            return text
        return None

    def _report_usage(self, attempt: Attempt, used: int, now: float) -> None:
        used_mb = -(-used // MB)
        if now >= attempt.report_at and used_mb != attempt.reported_mb:
            attempt.reported_mb, attempt.report_at = used_mb, now + USAGE_INTERVAL_SECONDS
            with contextlib.suppress(ChannelFull):  # a supervisor that is stopped must not stop us
                self._supervisor.send(Usage(attempt.run.token, used_mb), wait=False)


def _with_deadline(run: Run, deadline: float) -> Run:
    return replace(run, deadline=deadline)
