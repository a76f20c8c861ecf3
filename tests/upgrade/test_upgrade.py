"""What older versions and other programs wrote keeps working; indexes change, and versions mix, while jobs run."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import MongoClient, ReturnDocument

from supervisor.processes import boot_id, pid_namespace
from supervisor.store import schema
from tests.conftest import Start
from tests.support.running import Jobs, RunningSupervisor
from tests.support.waiting import wait_until

Document = dict[str, Any]
LEASE_SECONDS = 4.0


def hours_ago(hours: float) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


# -- documents --------------------------------------------------------------------------------------------------------

PENDING: dict[str, Document] = {
    "nothing optional": {},
    "no status": {"status": ...},
    "no dates": {"created_at": ..., "updated_at": ..., "scheduled_date": ...},
    "no logs": {"logs": ...},
    "logs are text": {"logs": "created by cron"},
    "numbers of a shell": {"required_memory": 128.0, "priority": 3.0, "attempts": 2.0},
    "nulls": {"queue": None, "priority": None, "env": None, "timeout": None, "lock": None, "unique_key": None},
    "a lock of text": {"lock": "host-17"},
    "a lock that was left": {"lock": {"supervisor_id": "gone", "token": "old", "expires_at": hours_ago(1)}},
    "fields of tomorrow": {"region": "eu", "limits": {"cpu": 2}, "lock_version": 7, "schema": 99},
    "an id of text": {"_id": "job-17"},
    "an id of a document": {"_id": {"tenant": 1, "number": 17}},
    "an id of a number": {"_id": 17},
    "counters of text": {"attempts": "none", "failures": None, "losses": "0"},
    "asked to cancel long ago": {"cancel_requested": False},
}
RUNNING: dict[str, Document] = {
    "an expired lock of few fields": {"lock": {"supervisor_id": "old", "token": "t", "expires_at": hours_ago(1)}},
    "an expired lock without a token": {"lock": {"expires_at": hours_ago(1)}},
    "no lock, silent for hours": {"updated_at": hours_ago(3)},
    "a lock that is null": {"lock": None, "updated_at": hours_ago(3)},
    "a lock of text, silent for hours": {"lock": "host-17", "updated_at": hours_ago(3)},
    "a lock of another program": {"lock": {"owner": "cron", "since": 5}, "updated_at": hours_ago(3)},
}


def test_pending_documents_of_others_run(start_supervisor: Start, jobs: Jobs) -> None:
    before = {name: jobs.insert(**fields) for name, fields in PENDING.items() if "id of" not in name}
    before |= {name: jobs.insert(**fields) for name, fields in PENDING.items() if "id of" in name}
    start_supervisor()
    after = {name: jobs.insert(**{k: v for k, v in fields.items() if k != "_id"}) for name, fields in PENDING.items()}
    for name, job_id in (*before.items(), *after.items()):
        wait_until(
            lambda job_id=job_id: (jobs.collection.find_one({"_id": job_id}) or {}).get("status") == "completed",
            what=lambda name=name, job_id=job_id: f"{name!r} to complete: {jobs.collection.find_one({'_id': job_id})}",
        )
    kept = jobs.collection.find_one({"_id": before["fields of tomorrow"]})
    assert kept is not None and (kept["region"], kept["limits"], kept["schema"]) == ("eu", {"cpu": 2}, 99)


def test_running_documents_that_nobody_answers_for_are_taken_back(start_supervisor: Start, jobs: Jobs) -> None:
    ids = {name: jobs.insert(status="running", **fields) for name, fields in RUNNING.items()}
    start_supervisor(lease_seconds=1, poll_interval=0.5)
    for name, job_id in ids.items():
        done = jobs.wait(job_id)
        assert done["status"] == "completed", (name, done)
        assert done["losses"] == 1, (name, done)


def test_a_running_document_of_another_program_is_left_alone(start_supervisor: Start, jobs: Jobs) -> None:
    young = jobs.insert(status="running")
    leased = jobs.insert(status="running", lock={"expires_at": hours_ago(-1)})
    supervisor = start_supervisor(lease_seconds=1, poll_interval=0.5)
    assert jobs.run("pass")["status"] == "completed"
    _wait_for_looks(supervisor, 4)
    assert [jobs.get(job_id)["status"] for job_id in (young, leased)] == ["running", "running"]


def _wait_for_looks(supervisor: RunningSupervisor, more: int) -> None:
    """Until the supervisor has looked for abandoned jobs so many times more."""

    def looks() -> float:
        return supervisor.metric("mongo_operation_seconds_count", operation="find_lost")

    before = looks()
    wait_until(lambda: looks() > before + more, what="another look for abandoned jobs")


def test_commands_show_whatever_is_there(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    finished = [
        {"status": "completed"},
        {"status": "failed", "error": {"code": 3}, "exit_code": "3", "reason": 17},
        {"status": "archived"},
        {"status": 5},
        {"status": "completed", "finished_at": "yesterday", "peak_memory": "much", "logs": [1, None, {"a": 1}]},
        {"status": "running", "lock": "host", "started_at": "today"},
    ]
    ids = [str(jobs.insert(**fields)) for fields in finished]
    supervisors = jobs.manager.supervisors._collection
    supervisors.insert_one({"_id": "older", "host": "older-host", "jobs_collection": "jobs"})
    supervisors.insert_one({"_id": "text", "host": 5, "jobs_collection": "jobs", "seen_at": "now", "jobs": "none"})
    commands = [["jobs", "list"], ["status"], ["doctor"], ["jobs", "memory"]]
    commands += [["jobs", "show", job_id] for job_id in ids] + [["jobs", "explain", job_id] for job_id in ids]
    for command in commands:
        for form in ([], ["--json"]):
            answer = supervisor.command(*command, *form)
            assert answer.returncode in (0, 1), (command, answer)
            assert "Error:" not in answer.stderr, (command, answer)
            if form:
                assert all(isinstance(json.loads(line), dict) for line in answer.stdout.splitlines()), command


def test_a_dead_supervisor_of_an_older_version_does_not_stop_the_start(start_supervisor: Start, jobs: Jobs) -> None:
    here = {"host": socket.gethostname(), "boot_id": boot_id(), "pid_namespace": pid_namespace()}
    jobs.manager.supervisors._collection.insert_many([{"_id": "a", **here}, {"_id": "b", **here, "pid": None}])
    start_supervisor()
    assert jobs.run("pass")["status"] == "completed"


# -- indexes ----------------------------------------------------------------------------------------------------------

OLD_SHAPES: dict[str, list[tuple[str, int]]] = {
    schema.CLAIM_INDEX: [("status", 1), ("scheduled_date", 1)],
    schema.CLAIM_BY_QUEUE_INDEX: [("queue", 1), ("status", 1)],
    schema.DUE_INDEX: [("scheduled_date", 1)],
    schema.LEASE_INDEX: [("lock.expires_at", 1)],
    schema.LIST_INDEX: [("created_at", -1)],
}


@contextmanager
def steady_work(jobs: Jobs) -> Iterator[list[str]]:
    """Submits short jobs without a pause."""
    script, submitted, stop = jobs.script("pass", "short.py"), [], threading.Event()

    def submit() -> None:
        while not stop.wait(0.02):
            submitted.append(jobs.submit(script))

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield submitted
    finally:
        stop.set()
        thread.join()


def _all_completed_once(jobs: Jobs, submitted: list[str]) -> None:
    for job_id in submitted:
        done = jobs.wait(job_id)
        assert (done["status"], done["attempts"], done.get("losses", 0)) == ("completed", 1, 0), done


def _progress(jobs: Jobs) -> Callable[[], int]:
    return lambda: jobs.collection.count_documents({"status": "completed"})


def test_jobs_run_on_while_an_index_is_missing(start_supervisor: Start, jobs: Jobs) -> None:
    """A newer version replaces an index: for as long as that takes there is none. Slower, but nothing is lost."""
    supervisor = start_supervisor(lease_seconds=LEASE_SECONDS, poll_interval=0.5)
    served = start_supervisor(lease_seconds=LEASE_SECONDS, queues="default", poll_interval=0.5)
    long = jobs.gated()
    long.wait_started()
    completed = _progress(jobs)
    with steady_work(jobs) as submitted:
        wait_until(lambda: completed() > 20, what="a steady flow")
        for name in OLD_SHAPES:
            jobs.collection.drop_index(name)
        renewed, before = jobs.get(long.id)["lock"]["expires_at"], completed()
        wait_until(
            lambda: jobs.get(long.id)["lock"]["expires_at"] > renewed + timedelta(seconds=2 * LEASE_SECONDS),
            what="leases to be renewed without the index",
        )
        assert completed() > before + 20, "jobs are claimed without the index"
    _all_completed_once(jobs, submitted)
    assert long.finish("completed")["attempts"] == 1
    for each in (supervisor, served):
        assert " ERROR " not in each.log(), each.log()


def test_an_index_of_another_shape_is_replaced_while_jobs_run(start_supervisor: Start, jobs: Jobs) -> None:
    older = start_supervisor(lease_seconds=LEASE_SECONDS, poll_interval=0.5)
    long = jobs.gated()
    long.wait_started()
    for name, keys in OLD_SHAPES.items():
        if name in jobs.collection.index_information():
            jobs.collection.drop_index(name)
        jobs.collection.create_index(keys, name=name)
    with steady_work(jobs) as submitted:
        newer = start_supervisor(lease_seconds=LEASE_SECONDS, queues="default", poll_interval=0.5)
        documents = [index.document for index in schema.job_indexes(by_queue=True)]
        wanted = {document["name"]: list(document["key"].items()) for document in documents}
        wait_until(lambda: _shapes(jobs, wanted) == wanted, what=lambda: f"the new shapes, not {_shapes(jobs, wanted)}")
        done = _progress(jobs)()
        wait_until(lambda: _progress(jobs)() > done + 20, what="jobs to go on")
    _all_completed_once(jobs, submitted)
    assert long.finish("completed")["attempts"] == 1
    for each in (older, newer):
        assert " ERROR " not in each.log(), each.log()


def _shapes(jobs: Jobs, names: Document) -> Document:
    found = jobs.collection.index_information()
    return {name: [(key, int(order)) for key, order in found[name]["key"]] for name in names if name in found}


# -- two versions -----------------------------------------------------------------------------------------------------


class OlderSupervisor:
    """Claims, renews and finishes as a version did that knew of fewer fields in a lock."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.id = f"older-{secrets.token_hex(4)}"

    def claim(self, seconds: float) -> Document:
        update = {
            "$set": {
                "status": "running",
                "lock": {
                    "supervisor_id": self.id, "host": "older-host", "token": secrets.token_hex(8),
                    "locked_at": datetime.now(UTC), "expires_at": datetime.now(UTC) + timedelta(seconds=seconds),
                },
            },
            "$inc": {"attempts": 1},
        }  # fmt: skip
        found = self.jobs.collection.find_one_and_update(
            {"status": "pending", "queue": "both"}, update, return_document=ReturnDocument.AFTER
        )
        assert found is not None
        return found

    def renew(self, claimed: Document, seconds: float) -> bool:
        later = datetime.now(UTC) + timedelta(seconds=seconds)
        return self._change(claimed, {"$set": {"lock.expires_at": later}})

    def finish(self, claimed: Document) -> bool:
        return self._change(claimed, {"$set": {"status": "completed", "exit_code": 0}, "$unset": {"lock": 1}})

    def _change(self, claimed: Document, update: Document) -> bool:
        condition = {"_id": claimed["_id"], "status": "running", "lock.token": claimed["lock"]["token"]}
        return self.jobs.collection.update_one(condition, update).matched_count == 1


@pytest.fixture
def older(jobs: Jobs) -> OlderSupervisor:
    return OlderSupervisor(jobs)


def test_an_older_version_keeps_what_it_renews(start_supervisor: Start, jobs: Jobs, older: OlderSupervisor) -> None:
    job_id = jobs.submit(jobs.script("pass"), queue="both")
    claimed = older.claim(30)
    supervisor = start_supervisor(lease_seconds=1, poll_interval=0.5)
    for _ in range(5):
        _wait_for_looks(supervisor, 1)
        assert older.renew(claimed, 30)
    shown = supervisor.json("jobs", "show", job_id)
    assert shown["status"] == "running"
    assert "older-host" in supervisor.command("status").stdout
    assert older.finish(claimed)
    assert jobs.get(job_id)["attempts"] == 1


def test_what_an_older_version_abandons_is_taken_over(
    start_supervisor: Start, jobs: Jobs, older: OlderSupervisor
) -> None:
    job_id = jobs.submit(jobs.script("pass"), queue="both")
    claimed = older.claim(1)
    start_supervisor(lease_seconds=1, poll_interval=0.5)
    done = jobs.wait(job_id)
    assert (done["status"], done["attempts"], done["losses"]) == ("completed", 2, 1)
    assert not older.renew(claimed, 60) and not older.finish(claimed), "its token is worth nothing any more"


def test_versions_share_a_queue(start_supervisor: Start, jobs: Jobs, older: OlderSupervisor) -> None:
    """Both claim from the same queue; each job runs once."""
    script = jobs.script("import os; print(os.environ['JOB_ATTEMPT'])")
    for _ in range(20):
        jobs.submit(script, queue="both")
    theirs = [older.claim(60) for _ in range(5)]
    supervisor = start_supervisor(queues="both")
    for claimed in theirs:
        assert older.finish(claimed)
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) == 20, what="all jobs to complete")
    assert {job["attempts"] for job in jobs.collection.find()} == {1}
    wait_until(lambda: supervisor.metric("jobs_finished_total", status="completed") == 15, what="its share")


def test_a_producer_that_knows_only_the_driver(
    supervisor: RunningSupervisor, jobs: Jobs, mongo_uri: str, db_name: str
) -> None:
    with MongoClient[Document](mongo_uri) as client:
        path = jobs.script("print('hi')")
        inserted = client[db_name]["jobs"].insert_one({"request_name": "x", "python_path": os.fspath(path)}).inserted_id
    assert jobs.wait(inserted)["status"] == "completed"
