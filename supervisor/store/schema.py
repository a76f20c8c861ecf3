"""The collections and their indexes: each serves one statement, and is made without blocking anybody."""

from __future__ import annotations

from typing import Any

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.database import Database
from pymongo.errors import OperationFailure

from supervisor.states import Status

OUTPUT_COLLECTION = "job_logs"
SUPERVISORS_COLLECTION = "supervisors"

CLAIM_INDEX = "claim"
CLAIM_BY_QUEUE_INDEX = "claim_by_queue"
DUE_INDEX = "due"
LEASE_INDEX = "lease"
UNIQUE_INDEX = "unique_key"
LIST_INDEX = "list"

_ORDER: list[tuple[str, int]] = [
    ("priority", DESCENDING),
    ("scheduled_date", ASCENDING),
    ("created_at", ASCENDING),
    ("required_memory", ASCENDING),  # last: a claim skips what does not fit without reading the documents
]
CLAIM_SORT = _ORDER[:3]
_DUE: list[tuple[str, int]] = [("queue", ASCENDING), ("scheduled_date", ASCENDING)]
_PENDING = {"status": Status.PENDING.value}
_RUNNING = {"status": Status.RUNNING.value}

Document = dict[str, Any]


def job_indexes(*, by_queue: bool) -> list[IndexModel]:
    """The indexes of the jobs. `by_queue` adds the one that only supervisors of chosen queues need."""
    indexes = [
        IndexModel(_ORDER, name=CLAIM_INDEX, partialFilterExpression=_PENDING),
        IndexModel(_DUE, name=DUE_INDEX, partialFilterExpression=_PENDING),
        IndexModel([("lock.expires_at", ASCENDING)], name=LEASE_INDEX, partialFilterExpression=_RUNNING),
        IndexModel(
            [("unique_key", ASCENDING)],
            name=UNIQUE_INDEX,
            unique=True,
            partialFilterExpression={
                "unique_key": {"$type": "string"},
                "status": {"$in": [Status.PENDING.value, Status.RUNNING.value]},
            },
        ),
        IndexModel([("status", ASCENDING), ("created_at", DESCENDING)], name=LIST_INDEX),
    ]  # fmt: skip
    if by_queue:
        indexes.append(
            IndexModel([("queue", ASCENDING), *_ORDER], name=CLAIM_BY_QUEUE_INDEX, partialFilterExpression=_PENDING)
        )
    return indexes


def output_indexes() -> list[IndexModel]:
    keys = [("job_id", ASCENDING), ("attempt", ASCENDING), ("seq", ASCENDING)]
    return [IndexModel(keys, name="chunk", unique=True)]


def ensure_indexes(database: Database[Document], collection: str, *, by_queue: bool = False) -> None:
    """Makes what is missing. An index of the same name and another shape, of an older version, is made anew.

    While jobs of other programs share a unique key, that index stays missing, and `doctor` says so.
    """
    jobs = database[collection]
    for index in job_indexes(by_queue=by_queue):
        try:
            _ensure(jobs, index)
        except OperationFailure as error:
            if error.code != 11000:
                raise
    for index in output_indexes():
        _ensure(database[OUTPUT_COLLECTION], index)


def _ensure(collection: Any, index: IndexModel) -> None:
    try:
        collection.create_indexes([index])
    except OperationFailure as error:
        if error.code not in (85, 86):  # IndexOptionsConflict, IndexKeySpecsConflict
            raise
        collection.drop_index(index.document["name"])
        collection.create_indexes([index])


def missing_indexes(database: Database[Document], collection: str) -> list[str]:
    """Names of the indexes that ought to be there and are not."""
    present = database[collection].index_information()
    return [name for index in job_indexes(by_queue=False) if (name := index.document["name"]) not in present]
