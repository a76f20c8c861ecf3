"""Admission: running jobs never reserve more than the budget, and a large one gets its turn."""

from __future__ import annotations

import os
import signal
import threading

from tests.conftest import Start
from tests.support.running import GatedJob, Jobs
from tests.support.waiting import wait_until


def running_mb(jobs: Jobs) -> int:
    stages = [{"$match": {"status": "running"}}, {"$group": {"_id": None, "mb": {"$sum": "$required_memory"}}}]
    rows = list(jobs.collection.aggregate(stages))
    return rows[0]["mb"] if rows else 0


def test_running_jobs_never_reserve_more_than_the_budget(start_supervisor: Start, jobs: Jobs) -> None:
    record = jobs.directory / "record"
    script = jobs.script("""
import os, sys, time
record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
size = int(os.environ["JOB_REQUIRED_MEMORY"])
os.write(record, f"{size}\\n".encode())
time.sleep(0.03)
os.write(record, f"{-size}\\n".encode())
""")
    for number in range(60):
        jobs.submit(script, record, required_memory=(100, 300, 700, 1000)[number % 4])
    supervisor = start_supervisor(workers=6, memory_budget=1000, poll_interval=3600)
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 60, what=supervisor.log)
    used = highest = 0
    for line in record.read_text().split():
        used += int(line)
        highest = max(highest, used)
    assert used == 0
    assert 700 < highest <= 1000
    assert jobs.collection.distinct("attempts") != []
    assert supervisor.metric("memory_budget_bytes") == 1000 * 2**20
    supervisor.wait_idle(6)
    wait_until(lambda: supervisor.metric("memory_reserved_bytes") == 0, what="all memory to be free")


def test_what_runs_is_reserved(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(workers=4, memory_budget=1000)
    three = [jobs.gated(required_memory=400) for _ in range(3)]
    # Claimed at the same moment by different workers, any two of them may come first.
    wait_until(lambda: sum(bool(job.notes("main", 1)) for job in three) == 2, what="two of them to start")
    first, second, third = sorted(three, key=lambda job: not job.notes("main", 1))
    wait_until(lambda: supervisor.metric("memory_reserved_bytes") == 800 * 2**20, what="the metric")
    small = jobs.gated(required_memory=200)
    small.wait_started()
    assert third.get()["status"] == "pending"
    assert third.get().get("attempts", 0) == 0, "a job that does not fit is not claimed again and again"
    first.finish()
    third.wait_started()
    for job in (second, third, small):
        assert job.finish()["attempts"] == 1


def test_a_large_job_is_not_starved_by_a_stream_of_small_ones(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(workers=3, memory_budget=900)
    script = jobs.script("import time; time.sleep(0.2)")
    over = threading.Event()

    def stream() -> None:
        while not over.is_set():
            if jobs.collection.count_documents({"status": "pending"}) < 8:
                jobs.submit(script, required_memory=300)
            over.wait(0.01)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        wait_until(lambda: running_mb(jobs) == 900, what="the small ones to fill the budget")
        large = jobs.gated(required_memory=900)
        large.wait_started(timeout=30)
    finally:
        over.set()
        thread.join()
    assert large.finish()["status"] == "completed"


def test_a_job_larger_than_the_budget_is_left_to_other_hosts(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(memory_budget=500)
    large = jobs.gated(required_memory=501, priority=10)
    assert jobs.run("pass", required_memory=500)["status"] == "completed"
    assert (large.get()["status"], large.get().get("attempts", 0)) == ("pending", 0)
    assert "larger host" in supervisor.command("doctor").stdout
    start_supervisor(memory_budget=501)
    large.wait_started()
    assert large.finish()["attempts"] == 1


def test_the_memory_of_a_killed_worker_is_given_back(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(memory_budget=500)
    job: GatedJob = jobs.gated(required_memory=500)
    job.wait_started()
    os.kill(job.get()["lock"]["worker_pid"], signal.SIGKILL)
    job.wait_started(attempt=2)
    job.finish()
    supervisor.wait_idle(2)
    wait_until(lambda: supervisor.metric("memory_reserved_bytes") == 0, what="all memory to be free")
    assert jobs.run("pass", required_memory=500)["status"] == "completed"
