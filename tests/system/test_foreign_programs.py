"""Programs that know nothing of us: a producer and a worker on the same collection, with a plain driver."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import MongoClient, ReturnDocument

from supervisor import JobManager, Status
from supervisor.errors import InvalidJob, LeaseLost
from tests.conftest import Start
from tests.support.running import Document, Jobs, RunningSupervisor
from tests.support.waiting import wait_until


class ForeignProducer:
    """Knows create_job with the first block of fields, and nothing else."""

    def __init__(self, uri: str, db_name: str) -> None:
        self.client: MongoClient[Document] = MongoClient(uri)
        self.jobs = self.client[db_name]["jobs"]

    def create_job(
        self,
        request_name: str,
        python_path: str,
        python_args: list[str],
        required_memory: int,
        scheduled_date: datetime,
    ) -> Any:
        now = datetime.utcnow()
        return self.jobs.insert_one(
            {
                "request_name": request_name,
                "status": "pending",
                "created_at": now,
                "updated_at": now,
                "scheduled_date": scheduled_date,
                "python_path": python_path,
                "python_args": python_args,
                "required_memory": required_memory,
                "logs": [],
            }
        ).inserted_id


class ForeignWorker:
    """Locks without a lease, and finishes with nothing but the status."""

    def __init__(self, uri: str, db_name: str) -> None:
        self.client: MongoClient[Document] = MongoClient(uri)
        self.jobs = self.client[db_name]["jobs"]

    def lock(self) -> Document | None:
        now = datetime.utcnow()
        return self.jobs.find_one_and_update(
            {"status": "pending", "scheduled_date": {"$lte": now}},
            {"$set": {"status": "running", "updated_at": now}},
            sort=[("created_at", 1)],
            return_document=ReturnDocument.AFTER,
        )

    def finish(self, job_id: Any, status: str) -> None:
        self.jobs.update_one({"_id": job_id}, {"$set": {"status": status}})


def test_a_foreign_producer(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    producer = ForeignProducer(supervisor.mongo_uri, supervisor.db_name)
    script = jobs.script("import sys; print(sys.argv[1:])")
    with producer.client:
        job_id = producer.create_job("plain", str(script), ["a", "b"], 128, datetime.utcnow())
        document = jobs.wait(job_id)
    assert (document["status"], document["attempts"]) == ("completed", 1)
    assert jobs.output(job_id) == b"['a', 'b']\n"


def test_a_foreign_worker_and_the_supervisor_share_the_queue(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    """Each job runs exactly once, here or there."""
    record = jobs.directory / "record"
    script = jobs.script("""
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(file, f"{sys.argv[2]}\\n".encode())
""")
    foreign: list[str] = []
    over = threading.Event()

    def work() -> None:
        worker = ForeignWorker(supervisor.mongo_uri, supervisor.db_name)
        with worker.client:
            while not over.is_set():
                job = worker.lock()
                if job is not None:
                    foreign.append(job["python_args"][1])
                    worker.finish(job["_id"], "completed")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        producer = ForeignProducer(supervisor.mongo_uri, supervisor.db_name)
        with producer.client:
            for n in range(300):
                producer.create_job("shared", str(script), [str(record), str(n)], 64, datetime.utcnow())
        wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 300, what="all to be done")
    finally:
        over.set()
        thread.join()
    ours = record.read_text().split()
    assert foreign and ours, "both have worked"
    assert sorted(map(int, foreign + ours)) == list(range(300))


@pytest.mark.parametrize(
    ("fields", "is_taken"),
    [
        ({"updated_at": timedelta(minutes=-59)}, False),
        ({"updated_at": timedelta(minutes=-61)}, True),
        ({"updated_at": ..., "created_at": timedelta(minutes=-61)}, True),
        ({"updated_at": timedelta(minutes=1)}, False),
        ({"updated_at": "long ago"}, False),
        ({"updated_at": timedelta(days=-1), "lock": "text"}, True),
        ({"updated_at": timedelta(days=-1), "lock": None}, True),
        ({"updated_at": timedelta(days=-1), "lock": [1, 2]}, True),
        ({"updated_at": timedelta(days=-1), "lock": {"by": "me"}}, True),
        ({"updated_at": timedelta(days=-1), "lock": {"expires_at": timedelta(minutes=1)}}, False),
    ],
    ids=str,
)
def test_running_jobs_of_others_are_taken_back_after_an_hour(
    start_supervisor: Start, jobs: Jobs, fields: Document, is_taken: bool
) -> None:
    now = datetime.now(UTC)

    def date(value: Any) -> Any:
        return now + value if isinstance(value, timedelta) else value

    fields = {name: date(value) for name, value in fields.items()}
    if isinstance(fields.get("lock"), dict):
        fields["lock"] = {name: date(value) for name, value in fields["lock"].items()}
    job_id = jobs.insert(status="running", **fields)
    expired = jobs.insert(status="running", lock={"expires_at": now - timedelta(seconds=1), "token": "x"})
    start_supervisor(lease_seconds=1)
    assert jobs.wait(expired)["losses"] == 1
    another = jobs.insert(status="running", lock={"expires_at": now - timedelta(seconds=1), "token": "x"})
    jobs.wait(another)  # so it has looked twice
    if is_taken:
        document = jobs.wait(job_id)
        assert (document["status"], document["losses"]) == ("completed", 1)
    else:
        assert jobs.get(job_id)["status"] == "running"


def test_a_foreign_worker_may_finish_what_it_runs(start_supervisor: Start, jobs: Jobs) -> None:
    job_id = jobs.insert()
    worker = ForeignWorker(jobs.manager.uri, jobs.collection.database.name)
    with worker.client:
        locked = worker.lock()
        assert locked is not None and locked["_id"] == job_id
        start_supervisor(lease_seconds=1)
        assert jobs.run("pass")["status"] == "completed"
        worker.finish(job_id, "failed")
    document = jobs.get(job_id)
    assert (document["status"], document.get("attempts")) == ("failed", None)


def test_documents_without_the_optional_fields_are_served_fairly(start_supervisor: Start, jobs: Jobs) -> None:
    """A missing priority is 0: before -1, behind 1, and in the order of their dates among themselves."""
    order = jobs.directory / "order"
    script = jobs.script("""
import os, sys
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT), f"{sys.argv[2]}\\n".encode())
""")
    now = datetime.now(UTC)

    def insert(name: str, seconds: float, **fields: Any) -> None:
        arguments = [str(order), name]
        date = now - timedelta(seconds=seconds)
        jobs.insert(python_path=str(script), python_args=arguments, scheduled_date=date, created_at=date, **fields)

    insert("low", 50, priority=-1)
    insert("plain-old", 40)
    insert("ours", 30, priority=0, queue="default")
    insert("plain-new", 20)
    insert("high", 10, priority=1)
    start_supervisor(workers=1)
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 5, what="all to be done")
    assert order.read_text().split() == ["high", "plain-old", "ours", "plain-new", "low"]


def test_a_foreign_document_is_served_at_once(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(poll_interval=3600)
    document = jobs.wait(jobs.insert(), timeout=10)
    assert (document["started_at"] - document["created_at"]).total_seconds() < 5


# -- a worker of somebody's own, on the public API -------------------------------------------------------------------


def test_a_loop_on_the_three_calls(jobs: Jobs, manager: JobManager) -> None:
    ids = [manager.create_job(f"job {n}", "task.py", [str(n)]) for n in range(3)]
    done = []
    while (job := manager.find_and_lock_job()) is not None:
        assert job["status"] == "running" and job["attempts"] == 1
        manager.update_job_status(job["_id"], "running", "half of it")
        manager.update_job_status(str(job["_id"]), Status.COMPLETED, "all of it")
        done.append(str(job["_id"]))
    assert done == ids
    for job_id in ids:
        document = jobs.get(job_id)
        assert (document["status"], "lock" in document) == ("completed", False)
        assert [line.partition("] ")[2] for line in document["logs"]][-2:] == ["half of it", "all of it"]


def test_the_loop_and_the_supervisor_share_the_queue(start_supervisor: Start, jobs: Jobs, manager: JobManager) -> None:
    script = jobs.script("pass")
    for _ in range(100):
        jobs.submit(script)
    start_supervisor(ready=False)
    own = 0
    while jobs.collection.count_documents({"status": "pending"}):
        job = manager.find_and_lock_job()
        if job is not None:
            own += 1
            manager.update_job_status(job["_id"], "completed", "done here")
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 100, what="all to be done")
    assert own > 0
    assert jobs.collection.distinct("attempts") == [1]


def test_a_lock_that_was_not_kept_is_lost(start_supervisor: Start, jobs: Jobs, manager: JobManager) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    assert manager.find_and_lock_job(lease_seconds=1) is not None
    start_supervisor(lease_seconds=1)
    document = jobs.wait(job_id)
    assert (document["status"], document["losses"]) == ("completed", 1)
    with pytest.raises(LeaseLost):
        manager.update_job_status(job_id, "failed", "too late")
    assert jobs.get(job_id) == document


def test_a_lock_is_left_to_its_owner(start_supervisor: Start, jobs: Jobs, manager: JobManager) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    assert manager.find_and_lock_job() is not None
    start_supervisor(lease_seconds=1)
    assert jobs.run("pass")["status"] == "completed"
    manager.update_job_status(job_id, "completed", "done")
    assert jobs.get(job_id)["attempts"] == 1


def test_who_gave_a_job_up_changes_nothing_any_more(jobs: Jobs, manager: JobManager) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    assert manager.find_and_lock_job() is not None
    manager.update_job_status(job_id, "pending", "not now")
    with JobManager(manager.uri, jobs.collection.database.name) as another:
        assert another.find_and_lock_job() is not None
        with pytest.raises(LeaseLost):
            manager.update_job_status(job_id, "failed", "too late")
        another.update_job_status(job_id, "completed", "done")
        with pytest.raises(LeaseLost):
            another.update_job_status(job_id, "failed", "changed my mind")
    document = jobs.get(job_id)
    assert (document["status"], document["attempts"], document["failures"]) == ("completed", 2, 0)


def test_a_job_of_a_supervisor_is_left_to_it(supervisor: RunningSupervisor, jobs: Jobs, manager: JobManager) -> None:
    job = jobs.gated()
    job.wait_started()
    for status in ("pending", "completed", "failed", "cancelled"):
        with pytest.raises(LeaseLost, match="run by a supervisor"):
            manager.update_job_status(job.id, status, "not mine")
    assert job.finish()["attempts"] == 1
    for status in ("pending", "running", "failed"):
        with pytest.raises(LeaseLost, match="is completed"):
            manager.update_job_status(job.id, status, "too late")


def test_a_job_that_another_program_locked_may_be_finished_by_anyone(jobs: Jobs, manager: JobManager) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    manager.update_job_status(job_id, Status.RUNNING, "mine")
    manager.update_job_status(job_id, Status.FAILED, "it did not work")
    document = jobs.get(job_id)
    assert (document["status"], document["attempts"], document["failures"]) == ("failed", 1, 1)
    assert (document["error"], document["reason"], document["exit_code"]) == ("it did not work", None, None)


def test_plain_documents_are_served_fairly_where_no_supervisor_runs(jobs: Jobs, manager: JobManager) -> None:
    now = datetime.now(UTC)
    plain = jobs.insert(scheduled_date=now - timedelta(seconds=100))
    later = jobs.submit(jobs.script("pass"), scheduled_date=now - timedelta(seconds=50))
    low = jobs.submit(jobs.script("pass"), scheduled_date=now - timedelta(seconds=200), priority=-1)
    without_status = jobs.insert(status=..., scheduled_date=now - timedelta(seconds=70))
    order = [str(document["_id"]) for _ in range(4) if (document := manager.find_and_lock_job())]
    assert order == [str(plain), str(without_status), later, low]


@pytest.mark.parametrize("message", [None, 5, b"x", ["x"]])
def test_a_message_that_is_no_text_is_refused(jobs: Jobs, manager: JobManager, message: Any) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    manager.find_and_lock_job()
    with pytest.raises(InvalidJob, match="log_message"):
        manager.update_job_status(job_id, "completed", message)
    manager.update_job_status(job_id, "completed", "x" * 20_000_000 + "\udcff")
    assert jobs.get(job_id)["logs"][-1].endswith("[… cut]")


@pytest.mark.parametrize(
    ("field", "value"), [("python_args", "abc"), ("python_args", 5), ("python_path", None), ("tags", "a")]
)
def test_a_wrong_argument_is_named(manager: JobManager, field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"request_name": "r", "python_path": "a.py", "tags": ("a", "b"), field: value}
    with pytest.raises(InvalidJob) as caught:
        manager.create_job(**arguments)
    assert caught.value.field == field


def test_ids_that_look_alike_are_not_confused(jobs: Jobs, manager: JobManager) -> None:
    for job_id in (5, "5"):
        jobs.insert(_id=job_id)
    for _ in range(2):
        document = manager.find_and_lock_job()
        assert document is not None
        manager.update_job_status(document["_id"], "completed", repr(document["_id"]))
    for job_id in (5, "5"):
        document = jobs.collection.find_one({"_id": job_id})
        assert document is not None and document["logs"][-1].endswith(f"] {job_id!r}")
