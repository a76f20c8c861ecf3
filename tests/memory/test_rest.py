"""What moves a job at rest, and what does not: real processes, looked at as the lookout does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from supervisor.memory.rest import Rest, WatchedRest
from tests.support.waiting import wait_until

MB = 1 << 20
# In the place of a runner: a subreaper with one child, which does what it is told.
RUNNER = """
import ctypes, os, signal, sys, threading, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
job = os.fork()
if job:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(job, flush=True)
    while True:
        signal.pause()
kept = []
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
DAEMON = "if os.fork() == 0: os.fork() or time.sleep(600); os._exit(0)"


class Job:
    """A process of its own below a stand-in for its runner."""

    def __init__(self) -> None:
        self._runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = int(self._answer())

    @property
    def runner_pid(self) -> int:
        return self._runner.pid

    def does(self, statement: str) -> None:
        """It has done so, and waits again."""
        assert self._runner.stdin is not None
        print(statement, file=self._runner.stdin, flush=True)
        assert self._answer() == "done"
        self.wait_asleep()

    def wait_asleep(self) -> None:
        process = psutil.Process(self.pid)
        wait_until(lambda: process.status() == psutil.STATUS_SLEEPING, what="the job to wait")

    def _answer(self) -> str:
        assert self._runner.stdout is not None
        return self._runner.stdout.readline().strip()

    def rest(self, room: int = 100 * MB, interval: float = 0.1, *, known: bool = True) -> Rest | None:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        resident = {self.pid: pages} if known else {}
        return Rest.of_tree(self.runner_pid, resident, room=room, tolerance=2 * MB, interval=interval)

    def watched(self, room: int = 100 * MB, interval: float = 0.1) -> WatchedRest:
        rest = self.rest(room, interval)
        assert rest is not None
        watched = WatchedRest(rest.message(), rest.descriptors)
        assert not watched.has_moved()
        return watched

    def end(self) -> None:
        for process in psutil.Process(self.runner_pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._runner.kill()
        self._runner.communicate()


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job()
    job.wait_asleep()
    yield job
    job.end()


def test_who_sleeps_is_at_rest(job: Job) -> None:
    for room in (100 * MB, 0, -MB):
        watched = job.watched(room)
        assert not any(watched.has_moved() for _ in range(3))
        watched.close()


def test_far_from_its_limit_a_job_may_run_and_take_a_little(job: Job) -> None:
    watched = job.watched()
    job.does("pass")
    assert not watched.has_moved()
    job.does("kept.append(bytearray(1024 * 1024))")
    assert not watched.has_moved()
    job.does("kept.append(bytearray(1024 * 1024))")
    job.does("kept.append(bytearray(1024 * 1024))")
    assert watched.has_moved(), "what it takes bit by bit adds up"
    watched.close()


def test_memory_that_was_freed_and_is_taken_again_counts(job: Job) -> None:
    job.does("kept.append(bytearray(50 * 1024 * 1024))")
    watched = job.watched()
    job.does("kept.clear()")
    assert not watched.has_moved()
    job.does("kept.append(bytearray(5 * 1024 * 1024))")
    assert watched.has_moved(), "what was swapped out looks like that, too"
    watched.close()


@pytest.mark.parametrize("room", [0, -5 * MB])
def test_without_room_whatever_it_does_is_a_move(job: Job, room: int) -> None:
    watched = job.watched(room)
    job.does("pass")
    assert watched.has_moved()
    watched.close()


def test_with_little_room_less_is_tolerated(job: Job) -> None:
    watched = job.watched(room=MB)
    job.does("kept.append(bytearray(700 * 1024))")
    assert watched.has_moved()
    watched.close()


@pytest.mark.parametrize(
    "statement",
    [
        "os.fork() or time.sleep(600)",
        DAEMON,
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "threading.Thread(target=lambda: os.fork() or time.sleep(600), daemon=True).start(); time.sleep(0.2)",
    ],
    ids=["child", "daemon", "thread", "child of a thread that has ended"],
)
def test_starting_anything_is_a_move(job: Job, statement: str) -> None:
    watched = job.watched()
    job.does(statement)
    assert watched.has_moved()
    watched.close()


def test_each_thread_is_watched(job: Job) -> None:
    job.does("event = threading.Event(); threading.Thread(target=event.wait, daemon=True).start()")
    watched = job.watched(room=0)
    assert not watched.has_moved()
    job.does("event.set(); time.sleep(0.05)")
    assert watched.has_moved()
    watched.close()


def test_the_end_is_a_move(job: Job) -> None:
    watched = job.watched()
    os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(job.pid), what="its end")
    assert watched.has_moved()
    watched.close()


def test_the_nearer_the_limit_the_sooner_is_the_next_look(job: Job) -> None:
    steps = []
    for room in (0, 40 * MB, 200 * MB, 4000 * MB):
        watched = job.watched(room)
        steps.append(watched.step)
        watched.close()
    assert steps == sorted(steps)
    assert steps[0] < 0.01 < steps[-1] <= 0.1
    watched = job.watched(4000 * MB, interval=0.002)
    assert watched.step <= 0.002
    watched.close()


def test_what_is_not_known_is_not_at_rest(job: Job) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert job.rest(known=False) is None
    job.does("os.fork() or time.sleep(600)")
    assert job.rest() is None
    assert len(os.listdir("/proc/self/fd")) == before, "nothing stays open"


def test_what_has_many_threads_is_not_handed_over(job: Job) -> None:
    before = len(os.listdir("/proc/self/fd"))
    job.does("[threading.Thread(target=time.sleep, args=(600,), daemon=True).start() for _ in range(40)]")
    assert job.rest() is None
    assert len(os.listdir("/proc/self/fd")) == before
