"""kill -9 of anything: what belongs to the job ends at once, the job runs again, and the pool is whole again."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.conftest import Start
from tests.support.running import GatedJob, Jobs, RunningSupervisor, is_alive, kill_at_once, wait_gone
from tests.support.waiting import wait_until


def worker_of(job: GatedJob) -> int:
    pid: int = job.get()["lock"]["worker_pid"]
    return pid


def runner_of(job: GatedJob) -> int:
    return psutil.Process(job.wait_started()).ppid()


def assert_ran_again(job: GatedJob, *, said: str) -> None:
    """The attempt was lost, and the next one completed."""
    job.wait_started(attempt=2)
    document = job.finish()
    assert document["status"] == "completed"
    assert (document["attempts"], document["losses"], document.get("failures", 0)) == (2, 1, 0)
    assert "lock" not in document
    assert document["reason"] is None and document["exit_code"] == 0
    story = "\n".join(document["logs"])
    assert story.count("picked up by worker") == 2
    assert f"attempt lost: {said}" in story


@pytest.mark.parametrize("victim", [worker_of, runner_of])
@pytest.mark.parametrize("start_method", ["warm", "exec"])
def test_a_job_whose_worker_or_runner_is_killed_runs_again(
    supervisor: RunningSupervisor, jobs: Jobs, victim: object, start_method: str
) -> None:
    job = jobs.family(hide=True, start_method=start_method)
    family = job.wait_family()
    assert callable(victim)
    os.kill(victim(job), signal.SIGKILL)
    wait_gone(family, within=2)
    assert_ran_again(job, said="its worker died")
    supervisor.wait_idle(2)
    assert supervisor.metric("jobs_reclaimed_total", cause="worker_died") == 1


def test_jobs_go_on_when_the_warm_interpreter_is_killed(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.family()
    family = job.wait_family()
    before = supervisor.warm_interpreter()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: supervisor.metric("worker_restarts_total", reason="warm_interpreter_died"), what="the restart")
    assert all(map(is_alive, family))
    assert job.finish()["attempts"] == 1
    supervisor.wait_idle(2)
    assert supervisor.warm_interpreter() != before
    assert jobs.run("print('on')")["status"] == "completed"


def test_jobs_go_on_when_the_keeper_is_killed(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(lease_seconds=4)
    job = jobs.gated()
    job.wait_started()
    os.kill(supervisor.keeper(), signal.SIGKILL)
    wait_until(lambda: supervisor.metric("worker_restarts_total", reason="keeper_died"), what="the restart")
    expires = job.get()["lock"]["expires_at"]
    wait_until(lambda: job.get()["lock"]["expires_at"] > expires, what="the next keeper to renew the lease")
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)
    assert jobs.run("print('on')")["status"] == "completed"


def test_keeper_and_worker_killed_at_once(start_supervisor: Start, jobs: Jobs) -> None:
    """The news of the worker's death must reach the next keeper: the lease would hold for half an hour."""
    supervisor = start_supervisor(lease_seconds=1800)
    job = jobs.gated()
    job.wait_started()
    kill_at_once(psutil.Process(pid) for pid in (supervisor.keeper(), worker_of(job)))
    assert_ran_again(job, said="its worker died")


def test_the_next_supervisor_takes_back_what_a_killed_one_left(start_supervisor: Start, jobs: Jobs) -> None:
    first = start_supervisor(lease_seconds=1800)
    job = jobs.family(hide=True)
    family = job.wait_family()
    tree = first.tree()
    first.kill()
    wait_gone([*family, *tree], within=2)
    assert job.get()["status"] == "running"
    second = start_supervisor(lease_seconds=1800)
    assert_ran_again(job, said="its supervisor died")
    assert second.metric("jobs_reclaimed_total", cause="startup") == 1


def test_supervisor_keeper_workers_and_warm_interpreter_killed_at_once(start_supervisor: Start, jobs: Jobs) -> None:
    first = start_supervisor()
    job = jobs.family(hide=True)
    family = job.wait_family()
    runners = first.runners()
    victims = [psutil.Process(pid) for pid in (first.pid, first.keeper(), *first.workers(), first.warm_interpreter())]
    kill_at_once(victims)
    first.wait()
    wait_gone([*family, *map(psutil.Process, filter(psutil.pid_exists, runners))], within=2)
    start_supervisor()
    assert_ran_again(job, said="its supervisor died")


@pytest.mark.parametrize("hide", [False, True])
def test_everything_of_ours_killed_at_once(start_supervisor: Start, jobs: Jobs, hide: bool) -> None:
    """Nobody is left to sweep up: the next supervisor ends what the jobs started, before it claims anything."""
    first = start_supervisor()
    job = jobs.family(hide=hide)
    family = job.wait_family()
    kill_at_once(process for process in first.everything() if process not in family)
    first.wait()
    start_supervisor()
    assert not [process for process in family if is_alive(process)]
    assert_ran_again(job, said="its supervisor died")


def test_a_supervisor_spares_the_processes_of_a_living_one(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(workers=1)
    job = jobs.family()
    family = job.wait_family()
    start_supervisor(workers=1)
    assert all(map(is_alive, family))
    assert job.finish()["attempts"] == 1
    wait_gone(family)


def test_a_job_that_kills_its_worker_each_time_is_lost(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    script = jobs.script("""
import os, sys
from pymongo import MongoClient
with MongoClient(sys.argv[1]) as client:
    job = client[sys.argv[2]].jobs.find_one({"request_name": "killer"})
os.kill(job["lock"]["worker_pid"], 9)
import time
time.sleep(60)
""")
    job_id = jobs.submit(script, supervisor.mongo_uri, supervisor.db_name, request_name="killer", max_attempts=50)
    document = jobs.wait(job_id)
    assert (document["status"], document["reason"]) == ("failed", "lost")
    assert (document["losses"], document["attempts"], document.get("failures", 0)) == (3, 3, 0)
    assert "3 losses" in document["error"]
    assert document["exit_code"] is None
    assert jobs.run("print('on')")["status"] == "completed"
    supervisor.wait_idle(2)


def test_a_job_that_kills_its_runner_each_time_is_lost(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    document = jobs.run("import os, time; os.kill(os.getppid(), 9); time.sleep(60)")
    assert (document["status"], document["reason"], document["losses"]) == ("failed", "lost", 3)
    supervisor.wait_idle(2)


def test_jobs_that_kill_their_runners_do_not_hold_up_the_others(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    """Each of them takes three slots with it; the next slot is there at once."""
    script = jobs.script("import os, time; os.kill(os.getppid(), 9); time.sleep(60)")
    poison = [jobs.submit(script) for _ in range(4)]
    good = [jobs.submit(jobs.script("pass", "good.py")) for _ in range(4)]
    for job_id in poison:
        assert jobs.wait(job_id)["reason"] == "lost"
    for job_id in good:
        assert jobs.wait(job_id)["status"] == "completed"
    began = min(jobs.get(job_id)["created_at"] for job_id in poison)
    ended = max(jobs.get(job_id)["finished_at"] for job_id in (*poison, *good))
    assert (ended - began).total_seconds() < 25, "no pause of the pool grew to 15 s"
    supervisor.wait_idle(2)


def test_counters_outlive_the_keeper(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    assert jobs.run("pass")["status"] == "completed"
    for deaths in (1, 2):
        wait_until(lambda: supervisor.metric("jobs_finished_total", status="completed") == 1, what="the count")
        wait_until(lambda: supervisor.metric("job_duration_seconds_count") == 1, what="the histogram")
        supervisor.wait_idle(2)
        os.kill(supervisor.keeper(), signal.SIGKILL)
        wait_until(
            lambda: supervisor.metric("worker_restarts_total", reason="keeper_died") == deaths,  # noqa: B023
            what="each death to be counted",
        )


def test_a_killed_job_process_is_a_failure_of_the_job(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.family(hide=True)
    family = job.wait_family()
    family[0].kill()
    document = jobs.wait(job.id)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "signal", -9)
    wait_gone(family)
    assert (document["failures"], document.get("losses", 0)) == (1, 0)
