"""MongoDB stops, hangs and dies while jobs run: nothing is lost, and nothing runs twice that need not."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.conftest import Start
from tests.support.mongod import MongoServer
from tests.support.running import Jobs, RunningSupervisor, wait_gone
from tests.support.waiting import wait_until
from tests.system.test_draining import assert_each_ran_once, submit_recorded, wait_drained


@contextlib.contextmanager
def outage(server: MongoServer) -> Iterator[float]:
    """MongoDB is stopped meanwhile. Gives when that began."""
    server.stop()
    try:
        yield time.monotonic()
    finally:
        server.start()


def wait_spooled(supervisor: RunningSupervisor, count: int) -> None:
    results = supervisor.directory / ".supervisor" / "results"
    wait_until(lambda: len(list(results.glob("*.json"))) == count, what=f"{count} results on disk")


@pytest.mark.parametrize(("lease_seconds", "seconds"), [(20, 6), (30, 20)])
def test_nothing_is_lost_while_mongodb_is_stopped(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer, lease_seconds: float, seconds: float
) -> None:
    supervisor = start_supervisor(lease_seconds=lease_seconds)
    ends_meanwhile, goes_on = jobs.gated(), jobs.gated()
    waits = jobs.gated()
    mains = [psutil.Process(job.wait_started()) for job in (ends_meanwhile, goes_on)]
    with outage(mongo_server) as began:
        ends_meanwhile.let_go()
        wait_gone(mains[:1])
        wait_until(lambda: supervisor.get("/readyz")[0] == 503, what="the supervisor to notice")
        assert supervisor.get("/healthz")[0] == 200
        wait_spooled(supervisor, 1)
        wait_until(lambda: time.monotonic() - began > seconds, what="the end of the outage")
        assert mains[1].is_running()
    document = jobs.wait(ends_meanwhile.id)
    assert (document["status"], document["attempts"], document["exit_code"]) == ("completed", 1, 0)
    assert jobs.output(ends_meanwhile.id) == b"begun\n"
    assert "--- STDOUT ---\nbegun" in "\n".join(document["logs"])
    for job in (goes_on, waits):
        document = job.finish()
        assert (document["status"], document["attempts"]) == ("completed", 1)
    wait_spooled(supervisor, 0)
    wait_until(supervisor.is_ready, what="the supervisor to be ready again")
    assert supervisor.metric("mongo_errors_total") > 0
    assert jobs.run("pass")["status"] == "completed"


def test_a_failure_during_the_outage_is_kept_like_a_success(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer
) -> None:
    start_supervisor()
    job = jobs.gated(
        source="""
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(f"main 1 {os.getpid()} 0\\n")
while not os.path.exists(sys.argv[1] + ".open"):
    time.sleep(0.01)
sys.exit("it went wrong")
"""
    )
    main = psutil.Process(job.wait_started())
    with outage(mongo_server):
        job.let_go()
        wait_gone([main])
    document = jobs.wait(job.id)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "exit_code", 1)
    assert document["error"] == "exited with code 1: it went wrong"
    assert (document["attempts"], document["failures"]) == (1, 1)


def test_results_on_disk_survive_a_restart_of_the_supervisor(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer
) -> None:
    first = start_supervisor()
    job = jobs.gated()
    main = psutil.Process(job.wait_started())
    with outage(mongo_server):
        job.let_go()
        wait_gone([main])
        assert first.stop(timeout=40) == 0
        wait_spooled(first, 1)
    assert job.get()["status"] == "running"
    start_supervisor()
    document = jobs.wait(job.id)
    assert (document["status"], document["attempts"]) == ("completed", 1)
    assert jobs.output(job.id) == b"begun\n"


def test_an_outage_longer_than_the_lease_ends_the_jobs(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer
) -> None:
    """Whoever has no lease must not go on: somebody else may have the job."""
    start_supervisor(lease_seconds=3)
    job = jobs.family()
    family = job.wait_family()
    with outage(mongo_server):
        wait_gone(family, within=6)
    job.wait_started(attempt=2)
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 2)
    assert document.get("failures", 0) == 0


def test_a_drain_ends_though_neither_mongodb_nor_the_disk_takes_a_result(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer
) -> None:
    supervisor = start_supervisor(shutdown_timeout=1)
    job = jobs.gated()
    main = psutil.Process(job.wait_started())
    results = supervisor.directory / ".supervisor" / "results"
    results.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(results)
    results.write_text("in the way")
    with outage(mongo_server):
        job.let_go()
        wait_gone([main])
        wait_until(lambda: "spool_failed" in supervisor.log(), what="the trouble to begin")
        assert supervisor.stop() == 0


def test_a_supervisor_without_descriptors_goes_on_when_it_has_some(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor()
    job = jobs.gated()
    job.wait_started()
    process = psutil.Process(supervisor.pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), before[1]))
    wait_until(lambda: "host_not_seen" in supervisor.log(), what="it to run out of descriptors")
    process.rlimit(psutil.RLIMIT_NOFILE, before)
    assert job.finish()["attempts"] == 1
    assert jobs.run("pass")["status"] == "completed"


def test_mongodb_is_killed_twice_while_jobs_drain(
    start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer
) -> None:
    record = submit_recorded(jobs, 600)
    start_supervisor(workers=4, ready=False)
    for done in (100, 300):
        wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) >= done, what=f"{done} jobs")  # noqa: B023
        mongo_server.kill()
        mongo_server.start()
    wait_drained(jobs, 600)
    assert_each_ran_once(record, 600)


def test_mongodb_hangs_for_a_moment(start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer) -> None:
    """Connections stay and answers do not come: nobody but MongoDB may hang."""
    supervisor = start_supervisor(lease_seconds=30)
    job = jobs.gated(timeout=3)
    main = psutil.Process(job.wait_started())
    mongo_server.pause()
    try:
        wait_gone([main], within=8)
        assert supervisor.get("/healthz")[0] == 200
    finally:
        mongo_server.resume()
    document = jobs.wait(job.id)
    assert (document["status"], document["reason"], document["attempts"]) == ("failed", "timeout", 1)


def test_a_start_without_mongodb_ends_with_3(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(workers=1)
    supervisor.environment["SUPERVISOR_MONGO_URI"] = "mongodb://user:secret@127.0.0.1:1/"
    supervisor.environment["SUPERVISOR_METRICS_PORT"] = "0"
    ended = supervisor.command("run")
    assert ended.returncode == 3
    assert "MongoDB" in ended.stderr and "secret" not in ended.stderr
