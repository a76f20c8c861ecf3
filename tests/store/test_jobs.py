"""Claiming on a real MongoDB: what it costs with a long queue, and who wins a race."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from supervisor import JobManager
from supervisor.errors import StoreUnavailable
from supervisor.store import schema, transitions
from supervisor.store.jobs import JobStore
from supervisor.store.transitions import Demand, Owner
from tests.support.mongod import MongoServer

OWNER = Owner(supervisor_id="s", host="h", worker_pid=7, worker="s/1")
PENDING = 20_000
SCHEDULED = 2_000


@pytest.fixture(scope="module")
def long_queue(mongo_server: MongoServer) -> Iterator[JobStore]:
    """20,000 pending jobs, the 2,000 of highest priority scheduled for next week. Left as it is by every test."""
    mongo_server.start()
    with JobManager(mongo_server.uri, "test_long_queue") as manager:
        manager.jobs.ensure_indexes(by_queue=True)
        now = datetime.now(UTC)
        manager.jobs.collection.insert_many(
            [
                {
                    "request_name": "r",
                    "python_path": "a.py",
                    "status": "pending",
                    "queue": "red" if n % 100 else "blue",
                    "priority": 9 if n < SCHEDULED else n % 3,
                    "scheduled_date": now + (timedelta(days=7) if n < SCHEDULED else -timedelta(seconds=n % 500)),
                    "created_at": now - timedelta(seconds=n % 70),
                    "required_memory": 512 if n % 50 else 64,
                }
                for n in range(PENDING)
            ]
        )
        yield manager.jobs
        manager.jobs.collection.database.client.drop_database("test_long_queue")


def explained(store: JobStore, demand: Demand) -> dict[str, Any]:
    """What a claim with this demand reads."""
    command = {
        "findAndModify": store.collection.name,
        "query": transitions.due(demand),
        "sort": dict(schema.CLAIM_SORT),
        "update": transitions.claim_update(OWNER, "t", 30),
        "hint": schema.CLAIM_BY_QUEUE_INDEX if demand.queues else schema.CLAIM_INDEX,
    }
    answer = store.collection.database.command("explain", command, verbosity="executionStats")
    stats: dict[str, Any] = answer["executionStats"]
    return stats


@pytest.mark.parametrize(
    "demand", [Demand(), Demand(limit_mb=4096), Demand(queues=["red"], limit_mb=4096), Demand(queues=["blue", "red"])]
)
def test_a_claim_reads_one_document_however_long_the_queue_is(long_queue: JobStore, demand: Demand) -> None:
    stats = explained(long_queue, demand)
    assert stats["nReturned"] == 1
    assert stats["totalDocsExamined"] <= 2
    assert stats["totalKeysExamined"] <= 20, "those of next week must be skipped, not read"


def test_a_claim_of_little_memory_reads_no_documents_that_do_not_fit(long_queue: JobStore) -> None:
    stats = explained(long_queue, Demand(limit_mb=100))
    assert stats["nReturned"] == 1
    assert stats["totalDocsExamined"] <= 2


def test_a_claim_that_finds_nothing_reads_nothing(long_queue: JobStore) -> None:
    stats = explained(long_queue, Demand(queues=["green"]))
    assert (stats["nReturned"], stats["totalDocsExamined"]) == (0, 0)
    assert stats["totalKeysExamined"] <= 5


def test_of_many_claimers_each_gets_another_job(manager: JobManager) -> None:
    ids = {manager.create_job("r", "a.py") for _ in range(200)}
    claimed: list[str] = []

    def work(number: int) -> None:
        owner = Owner(supervisor_id="s", host="h", worker_pid=number, worker=f"s/{number}")
        turn = 0
        while True:
            turn += 1
            if number % 2:
                found = manager.jobs.claim_ahead(owner, f"{number}-{turn}", Demand(), 30, 5)
            else:
                one = manager.jobs.claim(owner, f"{number}-{turn}", Demand(), 30)
                found = [one] if one else []
            claimed.extend(str(document["_id"]) for document in found)
            if not found and not manager.jobs.collection.count_documents({"status": "pending"}):
                return

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)), "two have the same job"
    assert set(claimed) == ids


def test_the_due_date_is_judged_by_the_server(manager: JobManager) -> None:
    now = datetime.now(UTC)
    manager.create_job("r", "a.py", scheduled_date=now + timedelta(seconds=60))
    assert manager.jobs.claim(OWNER, "t", Demand(), 30) is None
    manager.create_job("r", "a.py", scheduled_date=now - timedelta(seconds=1))
    assert manager.jobs.claim(OWNER, "t", Demand(), 30) is not None


def test_indexes_of_another_shape_are_made_anew(manager: JobManager) -> None:
    collection = manager.jobs.collection
    collection.create_index([("status", 1)], name=schema.CLAIM_INDEX)
    manager.jobs.ensure_indexes()
    manager.jobs.ensure_indexes()
    assert schema.missing_indexes(collection.database, collection.name) == []
    key = collection.index_information()[schema.CLAIM_INDEX]["key"]
    assert next(name for name, _ in key) == "priority"


def test_claims_go_on_without_their_index(manager: JobManager) -> None:
    """Somebody dropped it: slow is better than not at all, and no job may pay for it."""
    job_id = manager.create_job("r", "a.py")
    manager.jobs.collection.drop_indexes()
    document = manager.jobs.claim(OWNER, "t", Demand(), 30)
    assert document is not None and str(document["_id"]) == job_id


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with (
        JobManager("mongodb://user:secret@127.0.0.1:1/", "x", selection_timeout_seconds=0.1) as manager,
        pytest.raises(StoreUnavailable) as caught,
    ):
        manager.get_job("5")
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 3
