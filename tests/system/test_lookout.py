"""Jobs at rest are watched by the lookout; with it, without it and when it hangs, no overrun is missed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import Start
from tests.support.running import GatedJob, Jobs, RunningSupervisor, wait_gone
from tests.support.waiting import wait_until

RESTING_HOG = """
import os, sys, time
blocks = [bytearray(int(sys.argv[2]) * 2**20)]
record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(record, f"main {os.environ['JOB_ATTEMPT']} {os.getpid()} 0\\n".encode())
path = sys.argv[1] + ".open"
os.mkfifo(path + ".fifo")
open(path + ".fifo").read()  # asleep, until it is let go
while True:
    blocks.append(bytearray(2**20))
"""


def resting_hog(jobs: Jobs, held_mb: int) -> GatedJob:
    """A job of at most 100 MB that takes so much, sleeps, and takes all it can get when it is let go."""
    return jobs.gated(source=RESTING_HOG, arguments=[held_mb], required_memory=100)


def wake(job: GatedJob) -> None:
    with open(f"{job.path}.open.fifo", "w"):
        pass


def watches(lookout: int, pid: int) -> Callable[[], bool]:
    """Whether the lookout has this process's files open."""

    def has_it_open() -> bool:
        directory = f"/proc/{lookout}/fd"
        for name in os.listdir(directory):
            try:
                if os.readlink(f"{directory}/{name}") == f"/proc/{pid}/statm":
                    return True
            except FileNotFoundError:
                continue
        return False

    return has_it_open


@pytest.mark.parametrize("held_mb", [5, 92], ids=["far from its limit", "near its limit"])
def test_a_job_at_rest_is_handed_over_and_killed_when_it_overruns(
    supervisor: RunningSupervisor, jobs: Jobs, held_mb: int
) -> None:
    job = resting_hog(jobs, held_mb)
    pid = job.wait_started()
    lookout = supervisor.lookout()
    wait_until(watches(lookout, pid), what="the lookout to watch it")
    wake(job)
    document = jobs.wait(job.id)
    assert document["reason"] == "memory_exceeded"
    assert document["peak_memory"] < 1000, "long before it has all it wants"
    wait_until(lambda: not watches(lookout, pid)(), what="the lookout to let go")


def test_nothing_of_a_finished_job_stays_open(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    lookout = psutil.Process(supervisor.lookout())
    before = lookout.num_fds()
    for _ in range(2):
        job = jobs.gated()
        wait_until(watches(lookout.pid, job.wait_started()), what="the lookout to watch it")
        assert job.finish()["status"] == "completed"
        wait_until(lambda: lookout.num_fds() == before, what="the lookout to let go")


def test_a_lookout_that_is_killed_is_replaced_and_nothing_is_missed(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    first, second = resting_hog(jobs, 5), resting_hog(jobs, 90)
    pids = [first.wait_started(), second.wait_started()]
    lookout = psutil.Process(supervisor.lookout())
    for pid in pids:
        wait_until(watches(lookout.pid, pid), what="the lookout to watch them")
    lookout.kill()
    wait_gone([lookout])
    wake(first)
    assert jobs.wait(first.id)["reason"] == "memory_exceeded"
    wait_until(lambda: supervisor.metric("worker_restarts_total", reason="lookout_died"), what="the restart")
    wait_until(watches(supervisor.lookout(), pids[1]), what="the next lookout to watch what rests")
    wake(second)
    assert jobs.wait(second.id)["reason"] == "memory_exceeded"


def test_while_the_lookout_is_stopped_runners_look_themselves(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = resting_hog(jobs, 5)
    lookout = psutil.Process(supervisor.lookout())
    wait_until(watches(lookout.pid, job.wait_started()), what="the lookout to watch it")
    lookout.suspend()
    try:
        wake(job)
        assert jobs.wait(job.id)["reason"] == "memory_exceeded"
        another = resting_hog(jobs, 5)
        another.wait_started()
        wake(another)
        assert jobs.wait(another.id)["reason"] == "memory_exceeded"
    finally:
        lookout.resume()


def test_a_lookout_that_does_not_answer_is_replaced(start_supervisor: Start) -> None:
    supervisor = start_supervisor(lease_seconds=10)
    lookout = psutil.Process(supervisor.lookout())
    lookout.send_signal(signal.SIGSTOP)
    wait_until(lambda: not psutil.pid_exists(lookout.pid), timeout=90, what="the end of the lookout that hangs")
    wait_until(lambda: supervisor.lookout() != lookout.pid, what="the next one")
