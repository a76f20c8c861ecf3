"""A pool that polls once an hour: jobs start at once, scheduled ones in time, and only the server's clock counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import Start
from tests.support.running import Document, Jobs
from tests.support.waiting import wait_until

SHIFTED_CLOCK = """
import datetime, time
SHIFT = {shift}
real_time = time.time
time.time = lambda: real_time() + SHIFT

class Meta(type):
    def __instancecheck__(cls, value):  # what the driver decodes is of the class that was there before
        return isinstance(value, real)

real = datetime.datetime

class Shifted(datetime.datetime, metaclass=Meta):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=SHIFT)

    @classmethod
    def utcnow(cls):
        return super().utcnow() + datetime.timedelta(seconds=SHIFT)

datetime.datetime = Shifted
"""


def seconds_late(document: Document) -> float:
    late: float = (document["started_at"] - document["scheduled_date"]).total_seconds()
    return late


def test_a_new_job_wakes_an_idle_pool(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(poll_interval=3600)
    script = jobs.script("pass")
    for _ in range(20):
        supervisor.wait_idle(2)
        document = jobs.wait(jobs.submit(script), timeout=10)
        assert seconds_late(document) < 2


def test_many_new_jobs_wake_every_worker(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(poll_interval=3600, workers=4)
    gated = [jobs.gated() for _ in range(4)]
    for job in gated:
        job.wait_started(timeout=10)
    for job in gated:
        job.finish()


def test_a_scheduled_job_runs_not_before_its_date_and_promptly_after(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(poll_interval=3600)
    script, now = jobs.script("pass"), datetime.now(UTC)
    ids = [jobs.submit(script, scheduled_date=now + timedelta(seconds=seconds)) for seconds in (3, 1, 2)]
    for job_id in ids:
        assert 0 <= seconds_late(jobs.wait(job_id, timeout=15)) < 1.5


def test_jobs_that_were_scheduled_before_the_start(start_supervisor: Start, jobs: Jobs) -> None:
    """No change stream has told of them."""
    script, now = jobs.script("pass"), datetime.now(UTC)
    ids = [jobs.submit(script, scheduled_date=now + timedelta(seconds=seconds)) for seconds in (5, 6, 7)]
    start_supervisor(poll_interval=3600)
    for job_id in ids:
        document = jobs.wait(job_id, timeout=20)
        assert 0 <= seconds_late(document) < 1.5, document


def test_a_job_that_is_moved_to_now_wakes_the_pool(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(poll_interval=3600)
    job_id = jobs.submit(jobs.script("pass"), scheduled_date=datetime.now(UTC) + timedelta(days=1))
    jobs.manager.cancel_job(job_id)
    jobs.manager.retry_job(job_id)
    assert jobs.wait(job_id, timeout=10)["status"] == "completed"


def test_a_cancel_is_heard_at_once(start_supervisor: Start, jobs: Jobs) -> None:
    start_supervisor(poll_interval=3600)
    job = jobs.gated()
    job.wait_started()
    jobs.manager.cancel_job(job.id)
    jobs.wait(job.id, "cancelled", timeout=10)


@pytest.mark.parametrize("shift", [7200, -7200])
def test_only_the_clock_of_the_server_counts(start_supervisor: Start, jobs: Jobs, shift: int) -> None:
    """A supervisor whose host is two hours ahead, or behind, beside one whose clock is right."""
    shifted = jobs.directory / "shifted"
    shifted.mkdir()
    (shifted / "sitecustomize.py").write_text(SHIFTED_CLOCK.format(shift=shift))
    right = start_supervisor(lease_seconds=3, workers=1)
    held = jobs.gated()
    held.wait_started()
    start_supervisor(lease_seconds=3, workers=1, module_path=shifted)
    future = jobs.submit(jobs.script("pass"), scheduled_date=datetime.now(UTC) + timedelta(seconds=2.5))
    document = jobs.wait(future, timeout=15)
    assert 0 <= seconds_late(document) < 2
    first = held.get()["lock"]["token"]
    expires = held.get()["lock"]["expires_at"]
    wait_until(lambda: (held.get()["lock"]["expires_at"] - expires).total_seconds() > 3, what="some renewals")
    assert held.get()["lock"]["token"] == first, "the other took a lease that holds"
    other = jobs.gated()
    other.wait_started()
    assert held.finish()["attempts"] == 1
    assert other.finish()["attempts"] == 1
    assert right.is_ready()
