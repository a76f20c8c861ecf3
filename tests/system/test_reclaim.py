"""Leases: whoever falls silent loses the job, and never do two run it at the same time."""

from __future__ import annotations

import signal

import psutil

from supervisor.manager import new_document
from tests.conftest import Start
from tests.support.running import GatedJob, Jobs, wait_gone
from tests.support.waiting import wait_until


def assert_never_at_the_same_time(job: GatedJob) -> None:
    """The first attempt made its last note before the second made its first."""
    assert job.notes("beat", 1)[-1][1] < job.notes("main", 2)[0][1]


def test_a_lease_is_renewed_for_as_long_as_the_job_runs(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(lease_seconds=1)
    start_supervisor(lease_seconds=1)  # would take an expired one
    job = jobs.gated()
    job.wait_started()
    first = job.get()["lock"]
    wait_until(lambda: (job.get()["lock"]["expires_at"] - first["expires_at"]).total_seconds() > 2.5, what="renewals")
    assert job.get()["lock"]["token"] == first["token"]
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)


def test_a_stopped_supervisor_loses_its_jobs(start_supervisor: Start, jobs: Jobs) -> None:
    """kill -STOP of the supervisor itself: the runner ends the job at the lease's local deadline."""
    first = start_supervisor(lease_seconds=3)
    job = jobs.gated()
    main = psutil.Process(job.wait_started())
    second = start_supervisor(lease_seconds=3)
    first.signal(signal.SIGSTOP)
    wait_gone([main], within=4)
    job.wait_started(attempt=2)
    assert_never_at_the_same_time(job)
    assert second.pid in ancestors(job.wait_started(attempt=2))
    document = job.finish()
    assert (document["status"], document["attempts"], document.get("failures", 0)) == ("completed", 2, 0)
    assert document.get("losses", 0) + document.get("interruptions", 0) == 1
    first.signal(signal.SIGCONT)
    first.wait_idle(2)
    assert job.get() == document, "the one that lost the job has written something"


def test_everything_of_a_host_stopped_past_its_leases(start_supervisor: Start, jobs: Jobs) -> None:
    """As when a virtual machine is paused: what wakes up must not go on with the job, nor write its outcome."""
    first = start_supervisor(lease_seconds=2)
    job = jobs.gated()
    main = psutil.Process(job.wait_started())
    frozen = first.everything()
    for process in frozen:
        process.suspend()
    start_supervisor(lease_seconds=2)
    job.wait_started(attempt=2)
    for process in reversed(frozen):
        process.resume()
    wait_gone([main])
    document = job.finish()
    assert (document["status"], document["attempts"], document["losses"]) == ("completed", 2, 1)
    first.wait_idle(2)
    assert job.get() == document, "the one that lost the job has written something"


def test_a_stopped_worker_is_replaced_and_its_job_runs_again(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(lease_seconds=2)
    job = jobs.gated()
    job.wait_started()
    psutil.Process(job.get()["lock"]["worker_pid"]).suspend()
    job.wait_started(attempt=2, timeout=60)
    assert_never_at_the_same_time(job)
    assert job.finish()["losses"] == 1
    hung = {"reason": "worker_hung"}
    wait_until(lambda: supervisor.metric("worker_restarts_total", **hung) == 1, what="the metric")
    supervisor.wait_idle(2)


def test_a_worker_that_was_stopped_for_a_moment_goes_on(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(lease_seconds=2)
    job = jobs.gated()
    job.wait_started()
    worker = psutil.Process(job.get()["lock"]["worker_pid"])
    worker.suspend()
    expires = job.get()["lock"]["expires_at"]
    wait_until(lambda: (job.get()["lock"]["expires_at"] - expires).total_seconds() > 2, what="some renewals")
    worker.resume()
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)


def test_a_stopped_keeper_hangs_nobody_and_is_replaced(start_supervisor: Start, jobs: Jobs) -> None:
    """It does not read what the supervisor tells it: the supervisor must not wait for it."""
    count = 1500
    script = jobs.script("import sys; sys.exit('x' * 300)")  # much to tell
    documents = [new_document("many", str(script)) for _ in range(count)]
    jobs.manager.create_jobs(documents)
    supervisor = start_supervisor(lease_seconds=10)
    keeper = psutil.Process(supervisor.keeper())
    keeper.suspend()
    failed = {"status": "failed"}
    wait_until(
        lambda: jobs.collection.count_documents(failed) == count,
        timeout=80,
        what=lambda: f"all to be done: {supervisor.log()[-2000:]}",
    )
    wait_gone([keeper], within=40)
    supervisor.wait_idle(2)
    wait_until(lambda: supervisor.metric("jobs_finished_total", **failed) > 0, what="the next keeper to count")


def test_a_stopped_keeper_delays_no_end(start_supervisor: Start) -> None:
    supervisor = start_supervisor()
    keeper = psutil.Process(supervisor.keeper())
    keeper.suspend()
    assert supervisor.stop(timeout=30) == 0
    wait_gone([keeper])


def ancestors(pid: int) -> list[int]:
    return [parent.pid for parent in psutil.Process(pid).parents()]
