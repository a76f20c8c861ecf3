"""Each role allows what its users do, and no more. With a real MongoDB that checks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from supervisor import JobManager
from supervisor.errors import DuplicateJob, StoreUnavailable
from tests.security.conftest import Guarded, without_secrets
from tests.support.commands import Commands
from tests.support.running import Jobs, running_supervisor
from tests.support.waiting import wait_until

PRINTS = "print('out'); import sys; print('err', file=sys.stderr)"


def test_a_job_goes_through_with_the_least_rights(guarded: Guarded, tmp_path: Path) -> None:
    """Producers insert before any supervisor has made an index; the rest each in its role."""
    script = tmp_path / "job.py"
    script.write_text(PRINTS)
    with JobManager(guarded.uri("producer"), guarded.db_name) as producer:
        early = producer.create_job("early", script)
        with running_supervisor(
            tmp_path, guarded.uri("supervisor"), guarded.db_name, retention_days=1, queues="default,other"
        ) as supervisor:
            late = producer.create_job("late", script, queue="other")
            for job_id in (early, late):
                wait_until(lambda job_id=job_id: _is_final(producer, job_id), what=lambda: supervisor.log())
                assert producer.get_job(job_id)["status"] == "completed", supervisor.log()
            reader = Commands(guarded.uri("reader"), guarded.db_name, tmp_path)
            listed = reader("jobs", "list", "--json")
            assert {job["id"] for job in listed.documents} == {early, late}
            assert reader("jobs", "logs", late, "--stream", "stdout").out == "out\n"
            assert reader("jobs", "explain", late).code == 0
            assert reader("jobs", "memory", "--json").code == 0
            (live,) = reader("status", "--json").document["supervisors"]
            assert live["live"]
            doctor = reader("doctor", "--json")
            assert doctor.code == 0, doctor.out
            log = without_secrets(supervisor.log())
        # With every right that it needs, nothing was refused: no warning, no error, and changes arrived by stream.
        assert " WARNING " not in log and " ERROR " not in log, log
        with JobManager(guarded.server.uri, guarded.db_name) as admin:
            assert not admin.reports.missing_indexes()
            assert admin.supervisors.all() == [], "the supervisor has said goodbye"


def test_a_producer_is_told_whose_key_is_taken(guarded: Guarded, tmp_path: Path) -> None:
    with (
        JobManager(guarded.server.uri, guarded.db_name) as admin,
        JobManager(guarded.uri("producer"), guarded.db_name) as producer,
    ):
        admin.jobs.ensure_indexes()
        first = producer.create_job("first", tmp_path / "job.py", unique_key="one")
        with pytest.raises(DuplicateJob, match=first):
            producer.create_job("second", tmp_path / "job.py", unique_key="one")


def _is_final(manager: JobManager, job_id: str) -> bool:
    return manager.get_job(job_id)["status"] in ("completed", "failed", "cancelled")


def test_new_jobs_wake_a_supervisor_with_its_role(guarded: Guarded, tmp_path: Path) -> None:
    """The change stream is allowed, too: polling alone would take ten minutes here."""
    with (
        JobManager(guarded.uri("producer"), guarded.db_name) as producer,
        JobManager(guarded.server.uri, guarded.db_name) as admin,
        running_supervisor(tmp_path, guarded.uri("supervisor"), guarded.db_name, poll_interval=600) as supervisor,
    ):
        supervisor.wait_idle(2)
        jobs = Jobs(tmp_path, admin)
        job_id = producer.create_job("woken", jobs.script("pass"))
        jobs.wait(job_id, "completed", timeout=20)


def test_a_job_is_cancelled_and_retried_by_an_operator_only(guarded: Guarded, tmp_path: Path) -> None:
    with JobManager(guarded.server.uri, guarded.db_name) as admin:
        job_id = admin.create_job("later", tmp_path / "job.py")
        for user in ("producer", "reader"):
            refused = Commands(guarded.uri(user), guarded.db_name, tmp_path)("jobs", "cancel", job_id)
            assert refused.code == 3 and "refuses" in refused.err, refused
            assert admin.get_job(job_id)["status"] == "pending"
        operator = Commands(guarded.uri("operator"), guarded.db_name, tmp_path)
        assert operator("jobs", "cancel", job_id).code == 0
        assert admin.get_job(job_id)["status"] == "cancelled"
        assert operator("jobs", "retry", job_id).code == 0
        assert admin.get_job(job_id)["status"] == "pending"


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("producer", {"update": "jobs", "updates": [{"q": {}, "u": {"$set": {"status": "pending"}}}]}),
        ("producer", {"delete": "jobs", "deletes": [{"q": {}, "limit": 0}]}),
        ("producer", {"find": "job_logs"}),
        ("producer", {"dropIndexes": "jobs", "index": "*"}),
        ("operator", {"delete": "jobs", "deletes": [{"q": {}, "limit": 0}]}),
        ("reader", {"insert": "jobs", "documents": [{}]}),
        ("supervisor", {"insert": "jobs", "documents": [{}]}),
        ("supervisor", {"drop": "jobs"}),
        ("supervisor", {"insert": "other", "documents": [{}]}),
        ("supervisor", {"usersInfo": 1}),
    ],
)
def test_nobody_may_do_more(guarded: Guarded, user: str, command: dict[str, object]) -> None:
    with MongoClient[dict[str, object]](guarded.uri(user)) as client:
        with pytest.raises(OperationFailure) as refused:
            client[guarded.db_name].command(command)
        assert refused.value.code == 13


def test_a_producer_without_the_right_to_read_says_so(guarded: Guarded, tmp_path: Path) -> None:
    """Every right of the producer is needed: what is refused is one line, and an error with exit code 3."""
    with JobManager(guarded.uri("reader"), guarded.db_name) as reader:
        with pytest.raises(StoreUnavailable, match="refuses") as refused:
            reader.create_job("not allowed", tmp_path / "job.py")
        without_secrets(str(refused.value))
