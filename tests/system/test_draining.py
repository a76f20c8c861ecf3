"""Many supervisors, one queue: every job runs exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from supervisor.manager import new_document
from tests.conftest import Start
from tests.support.running import Jobs, RunningSupervisor
from tests.support.waiting import wait_until

COUNT = 2000
RECORDED = """
import os, sys
record = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(record, f"begin {sys.argv[2]}\\n".encode())
os.write(record, f"end {sys.argv[2]}\\n".encode())
"""


def submit_recorded(jobs: Jobs, count: int) -> Path:
    """Jobs that write down when they begin and end. Returns the file."""
    record = jobs.directory / "record"
    script = jobs.script(RECORDED)
    documents = [new_document("drain", str(script), python_args=[str(record), str(n)]) for n in range(count)]
    assert jobs.manager.create_jobs(documents) == []
    return record


def wait_drained(jobs: Jobs, count: int, timeout: float = 120) -> None:
    wait_until(
        lambda: jobs.collection.count_documents({"status": "completed"}) == count,
        timeout=timeout,
        what=lambda: str(list(jobs.collection.aggregate([{"$group": {"_id": "$status", "n": {"$sum": 1}}}]))),
    )


def assert_each_ran_once(record: Path, count: int) -> None:
    lines = Counter(record.read_text().splitlines())
    expected = {f"{kind} {n}" for kind in ("begin", "end") for n in range(count)}
    assert set(lines) == expected
    assert max(lines.values()) == 1, "a job ran twice"


def test_four_supervisors_drain_2000_jobs_each_exactly_once(start_supervisor: Start, jobs: Jobs) -> None:
    record = submit_recorded(jobs, COUNT)
    supervisors = [start_supervisor(workers=4, ready=False) for _ in range(4)]
    wait_drained(jobs, COUNT)
    assert_each_ran_once(record, COUNT)
    assert jobs.collection.distinct("attempts") == [1]
    assert jobs.collection.count_documents({"lock": {"$exists": True}}) == 0
    wait_until(lambda: finished(supervisors) == COUNT, what="the metrics to agree")
    assert all(supervisor.metric("jobs_finished_total") > 0 for supervisor in supervisors), "one did nothing"


def finished(supervisors: list[RunningSupervisor]) -> float:
    return sum(supervisor.metric("jobs_finished_total", status="completed") for supervisor in supervisors)


def test_supervisors_come_and_go_while_they_drain(start_supervisor: Start, jobs: Jobs) -> None:
    """Those that are told to stop finish what they have."""
    record = submit_recorded(jobs, 600)
    leaving = start_supervisor()
    wait_until(lambda: jobs.collection.count_documents({"status": "completed"}) > 50, what="some to be done")
    staying = start_supervisor()
    assert leaving.stop() == 0
    assert staying.is_ready()
    wait_drained(jobs, 600)
    assert_each_ran_once(record, 600)
    assert jobs.collection.distinct("attempts") == [1]
