"""A job that is cancelled, runs too long, or fails and is tried again."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.conftest import Shared
from tests.support.running import wait_gone
from tests.support.waiting import wait_until

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
METHODS = pytest.mark.parametrize("start_method", ["warm", "exec"])


# -- cancel ---------------------------------------------------------------------------------------------------------


@METHODS
def test_a_running_job_is_cancelled_with_all_that_it_started(shared: Shared, start_method: str) -> None:
    job = shared.jobs.family(hide=True, start_method=start_method, max_attempts=5)
    family = job.wait_family()
    assert str(shared.jobs.manager.cancel_job(job.id)) == "running"
    document = shared.jobs.wait(job.id, timeout=10)
    wait_gone(family)
    assert (document["status"], document["reason"]) == ("cancelled", "cancelled")
    assert document["exit_code"] == -15
    assert document.get("failures", 0) == 0
    assert "cancel_requested" not in document


def test_a_pending_job_is_cancelled_and_never_starts(shared: Shared) -> None:
    job_id = shared.jobs.submit(shared.jobs.script("pass"), queue="default", required_memory=10**6)
    assert str(shared.jobs.manager.cancel_job(job_id)) == "cancelled"
    document = shared.jobs.get(job_id)
    assert (document["status"], document["reason"], document.get("attempts", 0)) == ("cancelled", "cancelled", 0)


def test_a_job_that_is_deaf_to_sigterm_is_killed_after_its_grace(shared: Shared) -> None:
    job = shared.jobs.gated(source=DEAF + shared.jobs.gated_source)
    main = psutil.Process(job.wait_started())
    began = time.monotonic()
    shared.jobs.manager.cancel_job(job.id)
    wait_gone([main], within=10)
    assert time.monotonic() - began > 0.9, "KILL_GRACE is 1 s"
    document = shared.jobs.wait(job.id)
    assert (document["status"], document["exit_code"]) == ("cancelled", -9)


def test_a_job_may_clean_up_and_still_succeed_when_it_is_cancelled(shared: Shared) -> None:
    source = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + shared.jobs.gated_source
    job = shared.jobs.gated(source=source)
    job.wait_started()
    shared.jobs.manager.cancel_job(job.id)
    document = shared.jobs.wait(job.id)
    assert (document["status"], document["exit_code"]) == ("cancelled", 0)


def test_a_cancelled_job_can_be_retried(shared: Shared) -> None:
    job = shared.jobs.gated()
    job.wait_started()
    shared.jobs.manager.cancel_job(job.id)
    shared.jobs.wait(job.id, "cancelled")
    shared.jobs.manager.retry_job(job.id)
    job.wait_started(attempt=2)
    document = job.finish()
    assert (document["status"], document["attempts"], document["reason"]) == ("completed", 2, None)


# -- timeout --------------------------------------------------------------------------------------------------------


@METHODS
def test_a_job_that_runs_too_long_is_ended(shared: Shared, start_method: str) -> None:
    job = shared.jobs.family(hide=True, timeout=0.7, start_method=start_method)
    family = job.wait_family()
    document = shared.jobs.wait(job.id, timeout=15)
    wait_gone(family)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "timeout", -15)
    assert document["error"] == "ran longer than its timeout of 0.7 s"
    assert 0.7 <= document["duration_seconds"] < 5
    assert (document["attempts"], document["failures"]) == (1, 1)


def test_the_timeout_is_one_of_each_attempt(shared: Shared) -> None:
    document = shared.jobs.run("import time; time.sleep(60)", timeout=0.2, max_attempts=2, retry_delay=0)
    assert (document["status"], document["reason"], document["attempts"]) == ("failed", "timeout", 2)


def test_the_end_just_before_the_timeout_is_a_success(shared: Shared) -> None:
    assert shared.jobs.run("pass", timeout=30)["status"] == "completed"


# -- retry ----------------------------------------------------------------------------------------------------------


def test_failures_are_tried_again_later_and_later(shared: Shared) -> None:
    source = "import os, sys; sys.exit(int(os.environ['JOB_ATTEMPT']) < 3)"
    job_id = shared.jobs.submit(shared.jobs.script(source, "third.py"), max_attempts=3, retry_delay=0.5)
    wait_until(lambda: shared.jobs.get(job_id).get("failures") == 1, what="the first failure")
    waiting = shared.jobs.get(job_id)
    if waiting["status"] == "pending":
        delay = (waiting["scheduled_date"] - waiting["finished_at"]).total_seconds()
        assert 0.5 <= delay <= 0.7
        assert (waiting["reason"], waiting["exit_code"]) == ("exit_code", 1)
    wait_until(lambda: shared.jobs.get(job_id).get("failures") == 2, what="the second failure")
    second = shared.jobs.get(job_id)
    document = shared.jobs.wait(job_id)
    assert (document["status"], document["attempts"], document["failures"]) == ("completed", 3, 2)
    assert (document["exit_code"], document["reason"], document["error"]) == (0, None, None)
    assert (document["started_at"] - second["finished_at"]).total_seconds() >= 1.0
    assert sum("attempt failed" in line for line in document["logs"]) == 2


def test_no_more_attempts_than_allowed(shared: Shared) -> None:
    document = shared.jobs.run("raise SystemExit(4)", max_attempts=3, retry_delay=0.05)
    assert (document["status"], document["attempts"], document["failures"]) == ("failed", 3, 3)
    assert document["exit_code"] == 4


def test_one_attempt_is_the_default(shared: Shared) -> None:
    document = shared.jobs.run("raise SystemExit(4)")
    assert (document["status"], document["attempts"], document["failures"]) == ("failed", 1, 1)


def test_what_is_invalid_is_not_tried_again(shared: Shared) -> None:
    job_id = shared.jobs.insert(python_path="/no/such/file", max_attempts=5)
    document = shared.jobs.wait(job_id)
    assert (document["reason"], document["attempts"]) == ("invalid_job", 1)


def test_an_interpreter_that_does_not_exist_any_more(shared: Shared) -> None:
    """A working directory that goes away between the check and the start is `start_failed`, not a crash."""
    directory = shared.jobs.directory / "unenterable"
    directory.mkdir(exist_ok=True)
    document = shared.jobs.run("import os; print(os.getcwd())", cwd=str(directory))
    assert document["status"] == "completed"
    directory.rmdir()
    document = shared.jobs.run("pass", cwd=str(directory))
    assert (document["status"], document["reason"]) == ("failed", "invalid_job")
    assert document["error"].startswith("cwd: ")
