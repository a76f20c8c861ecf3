"""The policy of jobs as tables: what is accepted, and what becomes of an attempt."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from supervisor.errors import InvalidJob
from supervisor.job import (
    DEFAULT_MEMORY_MB,
    MAX_LOSSES,
    Counts,
    JobSpec,
    Outcome,
    decide,
    outcome_of,
    retry_delay,
)
from supervisor.states import Ending, Reason, Status

MINIMAL = {"request_name": "r", "python_path": "a.py"}


def spec(**fields: Any) -> JobSpec:
    return JobSpec.from_document(MINIMAL | fields)


# -- the door -------------------------------------------------------------------------------------------------------


def test_absent_fields_take_their_defaults() -> None:
    job = spec()
    assert (job.python_args, job.required_memory, job.queue, job.priority) == ([], DEFAULT_MEMORY_MB, "default", 0)
    assert (job.timeout, job.max_attempts, job.retry_delay, job.unique_key) == (None, 1, 5.0, None)
    assert (job.env, job.cwd, job.start_method, job.tags) == ({}, None, None, [])


def test_null_is_absent_and_unknown_is_ignored() -> None:
    assert spec(required_memory=None, env=None, unknown=object()) == spec()


@pytest.mark.parametrize(
    ("field", "given", "taken"),
    [
        ("required_memory", 256.0, 256),
        ("max_attempts", 3.0, 3),
        ("priority", -7, -7),
        ("timeout", 5, 5.0),
        ("python_args", ["", " ", "$x", "ü\n"], ["", " ", "$x", "ü\n"]),
        ("scheduled_date", datetime(2030, 1, 1), datetime(2030, 1, 1, tzinfo=UTC)),
        (
            "scheduled_date",
            datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            datetime(2030, 1, 1, tzinfo=UTC),
        ),
    ],
)
def test_what_other_clients_write_is_understood(field: str, given: Any, taken: Any) -> None:
    assert getattr(spec(**{field: given}), field) == taken


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_name": None}, "request_name"),
        ({"python_path": ""}, "python_path"),
        ({"python_path": "\ud800"}, "python_path"),
        ({"python_args": ["a", "b\0"]}, "python_args.1"),
        ({"scheduled_date": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))}, "scheduled_date"),
        ({"scheduled_date": datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5)))}, "scheduled_date"),
        ({"python_args": ("a",)}, "python_args"),
        ({"python_args": [b"a"]}, "python_args.0"),
        ({"env": {"": "x"}}, "env"),
        ({"env": {"A": 1}}, "env.A"),
        ({"required_memory": "128"}, "required_memory"),
        ({"required_memory": 2**70}, "required_memory"),
        ({"priority": 2**63}, "priority"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"start_method": "WARM"}, "start_method"),
        ({"memory_growth": 2.0}, "max_memory"),
        ({"max_memory": DEFAULT_MEMORY_MB - 1}, "max_memory"),
        ({"memory_growth": 2.0, "required_memory": 64, "max_memory": 63}, "max_memory"),
    ],
)
def test_the_first_wrong_field_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        JobSpec.from_document(MINIMAL | fields)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_a_large_value_makes_no_large_error() -> None:
    with pytest.raises(InvalidJob) as caught:
        spec(required_memory="x" * 10**6)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [None, "many", [], float("nan"), float("inf"), {}])
def test_counts_of_any_kind_can_be_read(value: Any) -> None:
    assert Counts.from_document({"attempts": value, "failures": 2}) == Counts(failures=2)


# -- the verdict ----------------------------------------------------------------------------------------------------


def failed(reason: Reason = Reason.EXIT_CODE) -> Outcome:
    return Outcome(reason=reason, error="it went wrong", exit_code=1)


@pytest.mark.parametrize(
    ("fields", "counts", "outcome", "status", "counter"),
    [
        ({}, Counts(), Outcome(exit_code=0), Status.COMPLETED, None),
        ({}, Counts(), failed(), Status.FAILED, "failures"),
        ({"max_attempts": 2}, Counts(), failed(), Status.PENDING, "failures"),
        ({"max_attempts": 2}, Counts(failures=1), failed(), Status.FAILED, "failures"),
        ({"max_attempts": 2}, Counts(attempts=9, losses=2, interruptions=7), failed(), Status.PENDING, "failures"),
        ({"max_attempts": 2}, Counts(), failed(Reason.TIMEOUT), Status.PENDING, "failures"),
        ({"max_attempts": 2}, Counts(), failed(Reason.SIGNAL), Status.PENDING, "failures"),
        ({"max_attempts": 2}, Counts(), failed(Reason.MEMORY_EXCEEDED), Status.PENDING, "failures"),
        ({"max_attempts": 2}, Counts(), failed(Reason.START_FAILED), Status.PENDING, "failures"),
        ({"max_attempts": 9}, Counts(), failed(Reason.INVALID_JOB), Status.FAILED, "failures"),
        ({"max_attempts": 9}, Counts(), failed(Reason.CANCELLED), Status.CANCELLED, None),
        ({}, Counts(), failed(Reason.LOST), Status.PENDING, "losses"),
        ({}, Counts(losses=MAX_LOSSES - 2), failed(Reason.LOST), Status.PENDING, "losses"),
        ({"max_attempts": 99}, Counts(losses=MAX_LOSSES - 1), failed(Reason.LOST), Status.FAILED, "losses"),
        ({}, Counts(failures=5), Outcome(handed_back="a shutdown"), Status.PENDING, "interruptions"),
    ],
)
def test_what_becomes_of_an_attempt(
    fields: dict[str, Any], counts: Counts, outcome: Outcome, status: Status, counter: str | None
) -> None:
    verdict = decide(spec(**fields), counts, outcome)
    assert (verdict.status, verdict.counter) == (status, counter)
    waits = status is Status.PENDING and counter == "failures"
    assert (verdict.retry_after_seconds is not None) == waits, "only failures wait before they run again"


def test_a_document_that_could_not_be_read_has_failed() -> None:
    assert decide(None, Counts(), failed(Reason.INVALID_JOB)).status is Status.FAILED


@pytest.mark.parametrize(
    ("fields", "memory"),
    [
        ({}, None),
        ({"memory_growth": 2.0, "max_memory": 1000}, 200),
        ({"memory_growth": 2.0, "max_memory": 150}, 150),
        ({"memory_growth": 2.0, "max_memory": 100}, None),
        ({"memory_growth": 1.001, "max_memory": 1000}, 101),
    ],
)
def test_growing_memory(fields: dict[str, Any], memory: int | None) -> None:
    verdict = decide(spec(required_memory=100, **fields), Counts(), failed(Reason.MEMORY_EXCEEDED))
    assert verdict.required_memory == memory
    assert verdict.status is (Status.FAILED if memory is None else Status.PENDING)


@pytest.mark.parametrize(
    ("first", "failures", "jitter", "seconds"),
    [(5, 1, 0, 5), (5, 2, 0, 10), (5, 4, 0, 40), (5, 1, 1, 6), (5, 12, 0, 3600), (5, 10**6, 1, 3600), (0, 9, 1, 0)],
)
def test_retries_come_later_and_later(first: float, failures: int, jitter: float, seconds: float) -> None:
    assert retry_delay(first, failures, jitter) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("ending", "exit_code", "reason", "error"),
    [
        (Ending.EXITED, 0, None, None),
        (Ending.EXITED, 3, Reason.EXIT_CODE, "exited with code 3: last words"),
        (Ending.EXITED, -11, Reason.SIGNAL, "killed by signal 11 (SIGSEGV)"),
        (Ending.EXITED, -63, Reason.SIGNAL, "killed by signal 63 (an unnamed signal)"),
        (Ending.EXITED, None, Reason.LOST, "the end of its process was not seen"),
        (Ending.MEMORY_EXCEEDED, -9, Reason.MEMORY_EXCEEDED, "sentence"),
        (Ending.MEMORY_EXCEEDED, 0, Reason.MEMORY_EXCEEDED, "sentence"),
        (Ending.TIMEOUT, 0, Reason.TIMEOUT, "sentence"),
        (Ending.CANCELLED, 0, Reason.CANCELLED, "sentence"),
        (Ending.START_FAILED, None, Reason.START_FAILED, "sentence"),
        (Ending.INTERRUPTED, 0, None, None),
    ],
)
def test_how_an_attempt_ended(ending: Ending, exit_code: int | None, reason: Reason | None, error: str | None) -> None:
    outcome = outcome_of(ending, exit_code, error="sentence", peak_memory_mb=7, last_words="last words")
    assert (outcome.reason, outcome.error, outcome.exit_code) == (reason, error, exit_code)
    assert outcome.peak_memory_mb == 7
    assert outcome.handed_back is None


@pytest.mark.parametrize(("ending", "exit_code"), [(Ending.INTERRUPTED, -15), (Ending.LEASE_ENDED, -9)])
def test_what_is_interrupted_is_handed_back(ending: Ending, exit_code: int) -> None:
    outcome = outcome_of(ending, exit_code, error="sentence", peak_memory_mb=None, last_words="")
    assert outcome.handed_back and outcome.reason is None


def test_who_lost_the_lease_has_not_completed() -> None:
    outcome = outcome_of(Ending.LEASE_ENDED, -9, error=None, peak_memory_mb=1, last_words="")
    assert decide(JobSpec(request_name="r", python_path="a.py"), Counts(), outcome).status is Status.PENDING
