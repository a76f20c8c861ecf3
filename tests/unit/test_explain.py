"""One sentence about a job, for every place that it can be in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from supervisor.cli.explain import Situation, explain

NOW = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def supervisor(**facts: Any) -> dict[str, Any]:
    usual = {"host": "alpha", "phase": "running", "workers": 2, "idle": 1, "busy": 1, "starting": 0}
    memory = {"budget_mb": 8192, "reserved_mb": 1024, "used_mb": 100}
    return {**usual, **memory, "queues": [], "paused": None, "jobs": [], **facts}


def pending(**fields: Any) -> dict[str, Any]:
    return {"_id": "a", "status": "pending", "scheduled_date": ago(10), "required_memory": 128, **fields}


LOCK = {"host": "alpha", "worker_pid": 7, "token": "t", "expires_at": NOW + timedelta(seconds=20)}


def running(**fields: Any) -> dict[str, Any]:
    return {"_id": "a", "status": "running", "started_at": ago(65), "attempts": 1, "lock": LOCK, **fields}


@pytest.mark.parametrize(
    ("job", "supervisors", "why", "words"),
    [
        (pending(scheduled_date=ago(-200)), [], "due_later", "in 3 min 20 s, at 2030-01-01 12:03:20 UTC"),
        (
            pending(scheduled_date=NOW + timedelta(seconds=4), failures=1, max_attempts=3, error="exited with code 1"),
            [],
            "retry_later",
            "failed (1 of 3): exited with code 1. It is tried again in 4.0 s",
        ),
        (pending(), [], "no_supervisor", "no supervisor is running"),
        (pending(queue="slow"), [supervisor(queues=["fast"])], "queue_not_served", "does not serve its queue, 'slow'"),
        (
            pending(),
            [supervisor(queues=["a"]), supervisor(queues=["b"])],
            "queue_not_served",
            "none of the 2 running supervisors serves its queue, 'default'",
        ),
        (pending(required_memory=9000), [supervisor()], "too_large", "It needs 8.8 GB, more than the whole memory"),
        (
            pending(required_memory=9000),
            [supervisor(budget_mb=10_000, queues=["other"]), supervisor()],
            "too_large",
            "the largest has 8 GB, on alpha",
        ),
        (
            pending(required_memory=6144),
            [supervisor(reserved_mb=5120)],
            "memory",
            "It waits for memory: 3 of the 6 GB it needs are free on alpha",
        ),
        (pending(), [supervisor(idle=0, busy=2)], "no_slot", "All 2 workers that could take it are busy"),
        (pending(), [supervisor(idle=0, busy=0, starting=2)], "starting", "The workers are still starting"),
        (pending(), [supervisor(paused="short of memory")], "paused", "short of memory on alpha"),
        (pending(), [supervisor(phase="draining")], "paused", "the supervisor is draining on alpha"),
        (pending(), [supervisor(paused="pressure", host="b"), supervisor()], "next", "it starts within moments"),
        (pending(), [supervisor()], "next", "there is room"),
        (pending(scheduled_date=None, queue=None, required_memory="much"), [supervisor()], "next", "there is room"),
        (running(), [], "running", "for 1 min 5 s on alpha, worker 7 (attempt 1), within 128 MB"),
        (
            running(timeout=100),
            [supervisor(jobs=[{"job_id": "b", "used_mb": 1}, {"job_id": "a", "used_mb": 40}])],
            "running",
            "uses 40 MB of its 128 MB; its timeout is in 35 s",
        ),
        (running(lock=None), [supervisor()], "running_elsewhere", "Another program runs it for 1 min 5 s"),
        (running(cancel_requested=True), [supervisor()], "stopping", "was asked to stop"),
        (running(lock={**LOCK, "expires_at": ago(30)}), [], "lease_expired", "30 s ago: no supervisor is there"),
        (
            {"status": "completed", "started_at": ago(63), "finished_at": ago(60), "peak_memory": 30},
            [],
            "completed",
            "at 2030-01-01 11:59:00 UTC after 3.0 s and used 30 MB of its 128 MB",
        ),
        (
            {"status": "failed", "reason": "memory_exceeded", "error": "used 70 MB of the 64 MB in required_memory"},
            [],
            "memory_exceeded",
            "used 70 MB of the 64 MB in required_memory. Raise required_memory",
        ),
        (
            {"status": "failed", "reason": "exit_code", "error": "x", "failures": 3, "max_attempts": 3},
            [],
            "exit_code",
            "It failed: x. All 3 attempts that it was allowed failed.",
        ),
        ({"status": "failed"}, [], "failed", "no reason was recorded"),
        ({"status": "cancelled", "error": "cancelled on request"}, [], "cancelled", "cancelled on request."),
        ({"status": "paused"}, [], "unknown_status", "Its status is 'paused'"),
        ({}, [], "unknown_status", "Its status is None"),
    ],
)  # fmt: skip
def test_says_why(job: dict[str, Any], supervisors: list[dict[str, Any]], why: str, words: str) -> None:
    explanation = explain(job, Situation(now=NOW, supervisors=supervisors))
    assert explanation.why == why
    assert words in explanation.sentence
    assert "\n" not in explanation.sentence
    assert explanation.sentence.endswith(".")


def test_counts_the_jobs_that_come_first() -> None:
    one = explain(pending(), Situation(now=NOW, supervisors=[supervisor()], jobs_before=1))
    assert one.why == "behind_others"
    assert "1 job comes first" in one.sentence
    many = explain(pending(), Situation(now=NOW, supervisors=[supervisor(idle=0, busy=2)], jobs_before=1000))
    assert "at least 1,000 jobs come first" in many.sentence


def test_names_the_holder_of_the_unique_key() -> None:
    waiting = explain(pending(), Situation(now=NOW, supervisors=[supervisor()], key_holder="other"))
    assert (waiting.why, "job other" in waiting.sentence) == ("unique_key", True)
    ended = explain({"status": "failed", "error": "x"}, Situation(now=NOW, key_holder="other"))
    assert "cannot be retried now: its unique key is taken by job other." in ended.sentence


def test_keeps_the_sentence_on_one_line() -> None:
    explanation = explain({"status": "failed", "error": "first\nsecond\r\n"}, Situation(now=NOW))
    assert explanation.sentence == "It failed: first second."
