"""Every move of a job on a real MongoDB: what it writes, and that it writes nothing to a job that is not its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from supervisor import JobManager
from supervisor.job import Counts, JobSpec, Outcome, decide
from supervisor.states import Reason, Status
from supervisor.store import transitions
from supervisor.store.transitions import Demand, Move, Owner

OWNER = Owner(supervisor_id="s", host="$host", worker_pid=7, worker="s/1")
SPEC = JobSpec(request_name="r", python_path="a.py", max_attempts=2)


@pytest.fixture
def job(manager: JobManager) -> Job:
    return Job(manager)


class Job:
    """One job, and what can be done to it."""

    def __init__(self, manager: JobManager) -> None:
        self.manager = manager
        self.id = self._insert()

    def _insert(self) -> Any:
        now = datetime.now(UTC)
        self.manager.jobs.ensure_indexes()
        return self.manager.jobs.collection.insert_one(
            {
                "request_name": "r",
                "python_path": "a.py",
                "status": "pending",
                "created_at": now,
                "scheduled_date": now,
                "priority": 0,
                "logs": ["[then] created"],
            }
        ).inserted_id

    def get(self) -> dict[str, Any]:
        document = self.manager.jobs.collection.find_one({"_id": self.id})
        assert document is not None
        return document

    def claim(self, token: str = "t", lease_seconds: float = 30) -> dict[str, Any] | None:
        return self.manager.jobs.claim(OWNER, token, Demand(), lease_seconds)

    def make(self, move: Move) -> bool:
        return self.manager.jobs.apply(move, "test")

    def finish(self, outcome: Outcome, token: str = "t", lines: list[str] | None = None) -> bool:
        verdict = decide(SPEC, Counts.from_document(self.get()), outcome, jitter=lambda: 0.0)
        return self.make(
            transitions.finish(
                self.id, token, outcome, verdict, attempt=self.get()["attempts"], details={}, lines=lines or ["ended"]
            )
        )


FAILURE = Outcome(reason=Reason.EXIT_CODE, error="$wrong {$sum: 1}", exit_code=1, peak_memory_mb=5)
SUCCESS = Outcome(exit_code=0, peak_memory_mb=9)
ANY_FINISH = [SUCCESS, FAILURE, Outcome(handed_back="a shutdown"), Outcome(reason=Reason.CANCELLED, exit_code=-15)]


def test_a_claim_writes_the_lock_and_the_story(job: Job) -> None:
    document = job.claim()
    assert document is not None
    lock = document["lock"]
    assert (document["status"], document["attempts"]) == ("running", 1)
    assert (lock["supervisor_id"], lock["host"], lock["worker_pid"], lock["token"]) == ("s", "$host", 7, "t")
    assert lock["expires_at"] - lock["locked_at"] == timedelta(seconds=30)
    assert document["started_at"] == lock["locked_at"]
    assert document["logs"][-1].endswith("picked up by worker 7 on $host")
    assert job.claim() is None


def test_a_success(job: Job) -> None:
    job.claim()
    assert job.finish(SUCCESS)
    document = job.get()
    assert (document["status"], document["exit_code"], document["peak_memory"]) == ("completed", 0, 9)
    assert (document["reason"], document["error"], "lock" in document) == (None, None, False)
    assert document["finished_at"] >= document["started_at"]


def test_failures_and_the_next_attempt(job: Job) -> None:
    job.claim()
    assert job.finish(FAILURE)
    first = job.get()
    assert (first["status"], first["failures"], first["attempts"]) == ("pending", 1, 1)
    assert first["error"] == "$wrong {$sum: 1}"
    assert first["scheduled_date"] - first["finished_at"] == timedelta(seconds=5)
    assert job.claim() is None, "not before its time"


@pytest.mark.parametrize("outcome", ANY_FINISH)
def test_whoever_has_another_token_writes_nothing(job: Job, outcome: Outcome) -> None:
    job.claim(token="new")
    before = job.get()
    assert not job.finish(outcome, token="old")
    assert not job.make(transitions.give_back(job.id, "old"))
    assert not job.make(transitions.confirm(job.id, "old"))
    assert not job.make(transitions.renew("s", ["old"], 99))
    assert not job.make(transitions.renew("another", ["new"], 99))
    assert not job.make(transitions.set_status(job.id, "old", Status.FAILED, "late"))
    assert job.get() == before


@pytest.mark.parametrize("outcome", ANY_FINISH)
def test_what_has_ended_stays_as_it_is(job: Job, outcome: Outcome) -> None:
    job.claim()
    assert job.finish(SUCCESS)
    before = job.get()
    assert not job.finish(outcome)
    assert not job.make(transitions.lose({"_id": job.id, **transitions.expired()}, "why"))
    assert not job.make(transitions.cancel_pending(job.id))
    assert not job.make(transitions.request_cancel(job.id))
    assert job.get() == before


def test_the_third_loss_is_the_last(job: Job) -> None:
    for losses, status in ((1, "pending"), (2, "pending"), (3, "failed")):
        job.claim()
        assert job.make(transitions.lose(transitions.of_worker("s", "s/1"), "its worker died"))
        document = job.get()
        assert (document["status"], document["losses"], document["attempts"]) == (status, losses, losses)
        assert (document["reason"], document["exit_code"], "lock" in document) == ("lost", None, False)


def test_only_expired_leases_are_taken_back(job: Job) -> None:
    job.claim(lease_seconds=3600)
    assert job.manager.jobs.lose(transitions.expired(), "why") == []
    job.manager.jobs.collection.update_one({}, {"$set": {"lock.expires_at": datetime.now(UTC) - timedelta(seconds=1)}})
    assert len(job.manager.jobs.lose(transitions.expired(), "why")) == 1
    assert job.get()["status"] == "pending"


def test_a_job_that_was_claimed_ahead_has_not_started(job: Job) -> None:
    document = job.manager.jobs.claim(OWNER, "t", Demand(), 30, sure_mb=1)
    assert document is not None
    assert document.get("attempts", 0) == 1, "without a size nothing waits"
    assert job.make(transitions.give_back(job.id, "t"))
    job.manager.jobs.collection.update_one({}, {"$set": {"required_memory": 500}})
    document = job.manager.jobs.claim(OWNER, "u", Demand(), 30, sure_mb=499)
    assert document is not None
    assert (document["attempts"], document["lock"]["ahead"]) == (1, True)
    assert job.make(transitions.confirm(job.id, "u"))
    assert not job.make(transitions.confirm(job.id, "u"))
    document = job.get()
    assert document["attempts"] == 2
    assert "ahead" not in document["lock"]


def test_a_cancel_that_comes_too_late_to_stop_it_still_prevents_the_retry(job: Job) -> None:
    job.claim()
    assert job.make(transitions.request_cancel(job.id))
    assert job.finish(FAILURE)
    document = job.get()
    assert (document["status"], document["reason"]) == ("cancelled", "cancelled")
    assert "cancel_requested" not in document


def test_a_lost_job_that_was_to_be_cancelled_is_cancelled(job: Job) -> None:
    job.claim()
    assert job.make(transitions.request_cancel(job.id))
    assert job.make(transitions.lose(transitions.of_supervisors(["s"]), "its supervisor died"))
    assert job.get()["status"] == "cancelled"


def test_a_retry_on_request_starts_afresh_but_counts_on(job: Job) -> None:
    for _ in range(2):
        job.manager.jobs.collection.update_one({}, {"$set": {"scheduled_date": datetime.now(UTC)}})
        job.claim()
        job.finish(FAILURE)
    assert job.get()["status"] == "failed"
    assert job.make(transitions.retry(job.id))
    document = job.get()
    assert (document["status"], document["failures"], document["attempts"]) == ("pending", 0, 2)
    assert (document["reason"], document["error"], "exit_code" in document) == (None, None, False)
    assert job.claim() is not None


@pytest.mark.parametrize("logs", ["text", None, 5, {"a": 1}, [1, None, {"$b": "$c"}]])
def test_a_log_of_any_kind_goes_on(job: Job, logs: Any) -> None:
    job.manager.jobs.collection.update_one({}, {"$set": {"logs": logs}})
    job.claim()
    assert job.finish(SUCCESS, lines=["$last {line}"])
    assert job.get()["logs"][-1].endswith("] $last {line}")


def test_the_log_of_many_attempts_stays_small(job: Job) -> None:
    for _ in range(60):
        job.manager.jobs.collection.update_one({}, {"$set": {"scheduled_date": datetime.now(UTC), "failures": 0}})
        job.claim()
        assert job.finish(FAILURE, lines=["x" * 128_000])
    assert sum(len(line) for line in job.get()["logs"]) < 600_000


# -- outcomes that are written together -------------------------------------------------------------------------------


def completed(job: Job, *, attempt: int = 1) -> Move:
    verdict = decide(SPEC, Counts(attempts=1), SUCCESS)
    lines, details = ["completed", "--- STDOUT ---\n$x"], {"duration_seconds": 0.5}
    ran = (1_800_000_000_000, 1_800_000_000_500)
    return transitions.finish(job.id, "t", SUCCESS, verdict, attempt=attempt, ran=ran, details=details, lines=lines)


def told(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what differs from write to write."""
    logs = [line.partition("] ")[2] for line in document["logs"]]
    kept = {name: value for name, value in document.items() if name not in ("_id", "created_at", "updated_at")}
    return {**kept, "logs": logs, "scheduled_date": None}


def test_outcomes_that_are_written_together_say_the_same_as_each_alone(manager: JobManager) -> None:
    alone, *together = jobs = [Job(manager) for _ in range(3)]
    for _ in jobs:
        assert alone.claim() is not None
    past = datetime(2027, 1, 15, 8, 0, 0, 500_000, tzinfo=UTC)
    for job in jobs:
        manager.jobs.collection.update_one({"_id": job.id}, {"$set": {"started_at": past}})
    assert alone.make(completed(alone))
    assert manager.jobs.apply_all([completed(job) for job in together], "finish") == [True, True]
    assert all(completed(job).completion for job in together)
    for job in together:
        same = told(job.get())
        expected = told(alone.get())
        for name in ("started_at", "finished_at"):  # alone, what is in the future is now
            assert same.pop(name) >= expected.pop(name)
        assert same == expected
        assert job.get()["finished_at"] == past


@pytest.mark.parametrize(("field", "value"), [("failures", "many"), ("logs", "none"), ("losses", [1])])
def test_an_odd_document_among_others_is_finished_like_them(manager: JobManager, field: str, value: Any) -> None:
    odd, *others = jobs = [Job(manager) for _ in range(3)]
    for _ in jobs:
        assert odd.claim() is not None
    manager.jobs.collection.update_one({"_id": odd.id}, {"$set": {field: value}})
    assert manager.jobs.apply_all([completed(job) for job in jobs], "finish") == [True, True, True]
    for job in jobs:
        document = job.get()
        assert (document["status"], "lock" in document, document["failures"], document["losses"]) == (
            "completed",
            False,
            0,
            0,
        )
    assert sum("completed" in line for line in others[0].get()["logs"]) == 1, "written once"


def test_of_outcomes_that_are_written_together_a_lost_one_is_told(manager: JobManager) -> None:
    lost, kept = Job(manager), Job(manager)
    for _ in range(2):
        assert lost.claim() is not None
    manager.jobs.collection.update_one({"_id": lost.id}, {"$set": {"lock.token": "another's"}})
    assert manager.jobs.apply_all([completed(lost), completed(kept)], "finish") == [False, True]
    assert lost.get()["status"] == "running"
