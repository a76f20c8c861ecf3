"""Which job is next: order, queues, unique keys; and what a claim costs is in tests/store/test_jobs.py."""

from __future__ import annotations

import itertools
import threading
from datetime import UTC, datetime, timedelta

import pytest

from supervisor import JobManager
from supervisor.errors import DuplicateJob
from tests.conftest import Start
from tests.support.running import Jobs
from tests.support.waiting import wait_until

NOTE = """
import os, sys
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT), f"{sys.argv[2]}\\n".encode())
"""


def test_the_order_of_running(start_supervisor: Start, jobs: Jobs) -> None:
    """Priority, then the scheduled date, then the date of creation; not what lies in the future."""
    order, script = jobs.directory / "order", jobs.script(NOTE)
    now = datetime.now(UTC)

    def insert(name: str, priority: int, due: float, created: float) -> None:
        jobs.insert(
            python_path=str(script),
            python_args=[str(order), name],
            priority=priority,
            scheduled_date=now + timedelta(seconds=due),
            created_at=now + timedelta(seconds=created),
        )

    insert("6", -5, -900, -900)
    insert("3", 0, -20, -10)
    insert("5", 0, -10, -30)
    insert("2", 0, -30, -5)
    insert("4", 0, -20, -5)
    insert("1", 7, -1, -1)
    insert("later", 100, 3600, -1)
    start_supervisor(workers=1)
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 6, what="all that are due")
    assert order.read_text().split() == ["1", "2", "3", "4", "5", "6"]
    assert jobs.collection.count_documents({"status": "pending"}) == 1


def test_each_supervisor_serves_its_queues(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(queues="red, blue")
    script = jobs.script("pass")
    ids = {queue: jobs.submit(script, queue=queue) for queue in ("red", "green", "blue", "default")}
    foreign = jobs.insert(queue=...)
    for queue in ("red", "blue"):
        assert jobs.wait(ids[queue])["status"] == "completed"
    for job_id in (ids["green"], ids["default"], foreign):
        assert jobs.get(job_id)["status"] == "pending"
    start_supervisor(queues="default")
    for job_id in (ids["default"], foreign):
        assert jobs.wait(job_id)["status"] == "completed"
    assert jobs.get(ids["green"])["status"] == "pending"
    start_supervisor()
    assert jobs.wait(ids["green"])["status"] == "completed"


def test_a_high_priority_in_a_queue_that_is_not_served_blocks_nothing(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(queues="red")
    for _ in range(20):
        jobs.submit(jobs.script("pass"), queue="green", priority=100)
    assert jobs.run("pass", queue="red", priority=-1)["status"] == "completed"


# -- unique keys ----------------------------------------------------------------------------------------------------


def test_of_many_with_the_same_key_one_is_inserted(jobs: Jobs, manager: JobManager) -> None:
    manager.jobs.ensure_indexes()
    script = jobs.script("pass")
    inserted: list[str] = []
    refused: list[DuplicateJob] = []
    start = threading.Barrier(8)

    def submit() -> None:
        start.wait()
        try:
            inserted.append(jobs.submit(script, unique_key="the one"))
        except DuplicateJob as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inserted), len(refused)) == (1, 7)
    assert {error.job_id for error in refused} == set(inserted)


def test_a_key_is_free_again_when_its_job_has_ended(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor()
    first = jobs.gated(unique_key="the one")
    first.wait_started()
    with pytest.raises(DuplicateJob):
        jobs.gated(unique_key="the one")
    first.finish()
    second = jobs.gated(unique_key="the one")
    second.wait_started()
    with pytest.raises(DuplicateJob):
        jobs.manager.retry_job(first.id)
    assert first.get()["status"] == "completed"
    second.finish()
    jobs.manager.retry_job(first.id)
    first.wait_started(attempt=2)
    assert first.finish()["attempts"] == 2


def test_a_retry_keeps_the_key(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor()
    job_id = jobs.submit(jobs.script("raise SystemExit(1)"), unique_key="k", max_attempts=2, retry_delay=3600)
    wait_until(lambda: jobs.get(job_id).get("failures") == 1, what="the first failure")
    with pytest.raises(DuplicateJob):
        jobs.gated(unique_key="k")
    assert str(jobs.manager.cancel_job(job_id)) == "cancelled"
    jobs.submit(jobs.script("pass"), unique_key="k")


def test_of_documents_that_shared_a_key_before_anybody_forbade_it_one_runs(start_supervisor: Start, jobs: Jobs) -> None:
    first, second = (jobs.insert(unique_key="the one") for _ in range(2))
    start_supervisor()
    assert jobs.wait(first)["status"] == "completed"
    refused = jobs.wait(second)
    assert (refused["status"], refused["reason"]) == ("failed", "invalid_job")
    assert refused["error"].startswith("unique_key: ") and str(first) in refused["error"]
    assert "unique_key" in jobs.collection.index_information()


# -- short jobs, which are claimed ahead ------------------------------------------------------------------------------


def test_short_jobs_tell_when_they_ran_and_never_reserve_more_than_the_budget(
    start_supervisor: Start, jobs: Jobs
) -> None:
    """Claimed several at a time, they are `running` before their turn comes; still the documents tell the truth."""
    script = jobs.script("import time; time.sleep(0.02)")
    ids = [jobs.submit(script, required_memory=64) for _ in range(60)]
    highest = 0
    over = threading.Event()
    stages = [{"$match": {"status": "running"}}, {"$group": {"_id": None, "mb": {"$sum": "$required_memory"}}}]

    def watch() -> None:
        nonlocal highest
        while not over.is_set():
            highest = max(highest, *(row["mb"] for row in jobs.collection.aggregate(stages)), 0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        start_supervisor(workers=1, memory_budget=256)
        wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 60, what="all to be done")
    finally:
        over.set()
        thread.join()
    assert 64 <= highest <= 256
    documents = [jobs.get(job_id) for job_id in ids]
    assert documents == sorted(documents, key=lambda document: document["started_at"]), "in the order of running"
    for earlier, later in itertools.pairwise(documents):
        assert earlier["started_at"] < earlier["finished_at"]
        both = earlier["finished_at"] - later["started_at"]
        assert both < timedelta(seconds=0.02), "one worker, one after the other, but for the error of its clock"
    for document in documents:
        assert (document["attempts"], document["failures"], document["interruptions"], document["losses"]) == (
            1,
            0,
            0,
            0,
        )
