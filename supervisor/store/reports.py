"""What people and metrics ask about the jobs. Read-only."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pymongo import ASCENDING, DESCENDING

from supervisor.job import DEFAULT_MEMORY_MB
from supervisor.states import Reason, Status
from supervisor.store import schema, transitions
from supervisor.store.jobs import JobStore, by_index, possible_ids
from supervisor.store.sizing import Run, ScriptMemory, script_memory
from supervisor.store.transitions import Demand

Document = dict[str, Any]

HISTORY_RUNS = 500
"""Runs of one script that right-sizing looks at."""
HISTORY_DOCUMENTS = 200_000
"""Finished jobs, the newest, that it reads at most."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """What waits in one queue and is due."""

    due: int
    oldest_age_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list; every field narrows the choice."""

    statuses: Sequence[str] = ()
    queue: str | None = None
    tag: str | None = None
    reason: str | None = None
    name: str | None = None
    """Part of `request_name`, in any case."""
    script: str | None = None
    """Part of `python_path`."""
    since: datetime | None = None
    until: datetime | None = None

    def condition(self) -> Document:
        wanted: Document = {}
        if self.statuses:
            wanted["status"] = {"$in": list(self.statuses)}
        if self.queue is not None:
            wanted["queue"] = {"$in": [self.queue, None]} if self.queue == "default" else self.queue
        if self.tag is not None:
            wanted["tags"] = self.tag
        if self.reason is not None:
            wanted["reason"] = self.reason
        if self.name is not None:
            wanted["request_name"] = {"$regex": re.escape(self.name), "$options": "i"}
        if self.script is not None:
            wanted["python_path"] = {"$regex": re.escape(self.script)}
        created: Document = {}
        if self.since is not None:
            created["$gte"] = self.since
        if self.until is not None:
            created["$lt"] = self.until
        if created:
            wanted["created_at"] = created
        return wanted


class Reports:
    """Questions about the collection of jobs."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._collection = jobs.collection

    def jobs_by_status(self) -> dict[str, int]:
        """How many documents have each status; every status is there."""

        def count(status: Status, hint: str | None) -> int:
            return self._collection.count_documents({"status": status.value}, **_hint(hint))

        with self._jobs.operation("count"):
            return {status.value: by_index(schema.LIST_INDEX, functools.partial(count, status)) for status in Status}

    def queues(self, *, only: Sequence[str] = ()) -> dict[str, QueueState]:
        """Due jobs and the age of the oldest, for each queue with pending jobs."""
        match: Document = {"status": Status.PENDING.value, "$expr": {"$lte": ["$scheduled_date", "$$NOW"]}}
        if only:
            match["queue"] = {"$in": [*only, None] if "default" in only else list(only)}
        real_date = {"$cond": [{"$eq": [{"$type": "$scheduled_date"}, "date"]}, "$scheduled_date", "$$NOW"]}
        stages: list[Document] = [
            {"$match": match},
            {"$group": {"_id": "$queue", "due": {"$sum": 1}, "oldest": {"$min": real_date}}},
            {"$set": {"age": {"$divide": [{"$subtract": ["$$NOW", "$oldest"]}, 1000]}}},
        ]
        with self._jobs.operation("count"):
            rows = by_index(schema.DUE_INDEX, lambda hint: list(self._collection.aggregate(stages, **_hint(hint))))
        found: dict[str, QueueState] = {}
        for row in rows:
            name = "default" if row["_id"] is None else str(row["_id"])
            before = found.get(name, QueueState(0, 0.0))
            age = max(before.oldest_age_seconds, float(row["age"]), 0.0)
            found[name] = QueueState(before.due + row["due"], age)
        return found

    def next_due_in(self, *, only: Sequence[str] = ()) -> float | None:
        """Seconds until the next scheduled job is due; None: none is scheduled."""
        later: Document = {"status": Status.PENDING.value, "$expr": {"$gt": ["$scheduled_date", "$$NOW"]}}
        if only:
            later["queue"] = {"$in": [*only, None] if "default" in only else list(only)}
        with self._jobs.operation("next_due"):
            queues = self._collection.distinct("queue", {"status": Status.PENDING.value}) if not only else list(only)
            if not queues:
                return None
            delays = []
            for queue in queues:
                names = [queue, None] if queue == "default" else [queue]
                stages: list[Document] = [
                    {"$match": {**later, "queue": {"$in": names}}},
                    {"$sort": {"scheduled_date": 1}},
                    {"$limit": 1},
                    {"$project": {"in": {"$divide": [{"$subtract": ["$scheduled_date", "$$NOW"]}, 1000]}}},
                ]
                ask = functools.partial(self._aggregate, stages)
                head = by_index(schema.DUE_INDEX, ask)
                delays += [float(row["in"]) for row in head if isinstance(row.get("in"), int | float)]
        return min(delays, default=None)

    def _aggregate(self, stages: list[Document], hint: str | None) -> list[Document]:
        return list(self._collection.aggregate(stages, **_hint(hint)))

    def head(self, demand: Demand) -> Document | None:
        """The job that a claim would take first."""
        index = schema.CLAIM_BY_QUEUE_INDEX if demand.queues else schema.CLAIM_INDEX
        projection = {"required_memory": True, "scheduled_date": True}
        with self._jobs.operation("head"):
            return by_index(
                index,
                lambda hint: self._collection.find_one(
                    transitions.due(demand), projection, sort=schema.CLAIM_SORT, hint=hint
                ),
            )

    def newest(self, chosen: JobFilter, *, limit: int = 50, skip: int = 0) -> list[Document]:
        """Jobs, newest first, without their logs."""
        condition = chosen.condition()
        with self._jobs.operation("list"):
            if "status" not in condition:  # every status there is: the index on status and date serves this, too
                condition["status"] = {"$in": [*self._collection.distinct("status"), None]}
            cursor = self._collection.find(condition, {"logs": False, "env": False})
            return list(cursor.sort("created_at", DESCENDING).skip(skip).limit(limit))

    def ids(self, chosen: JobFilter) -> Iterator[Any]:
        with self._jobs.operation("list"):
            for document in self._collection.find(chosen.condition(), {"_id": True}).sort("created_at", ASCENDING):
                yield document["_id"]

    def running(self) -> list[Document]:
        """Everything that runs, whoever runs it, oldest first, with `expired` where its lease has ended."""
        stages: list[Document] = [
            {"$match": {"status": Status.RUNNING.value}},
            {"$project": {"logs": False, "env": False, "python_args": False}},
            {
                "$set": {
                    "expired": {"$gt": [_seconds_since("lock.expires_at"), 0]},
                    "running_seconds": {"$ifNull": [_seconds_since("started_at"), _seconds_since("updated_at")]},
                }
            },
            {"$sort": {"started_at": 1}},
        ]
        with self._jobs.operation("list"):
            return list(self._collection.aggregate(stages))

    def larger_than(self, memory_mb: int, *, limit: int = 20) -> list[Document]:
        """Due jobs that need more memory than this."""
        condition = {"status": Status.PENDING.value, "required_memory": {"$gt": memory_mb}}
        with self._jobs.operation("list"):
            return list(self._collection.find(condition, {"logs": False}).limit(limit))

    def pending_before(self, document: Document, *, only: Sequence[str] = (), limit: int = 1000) -> int:
        """How many due jobs of these queues (none: all) come first in the order of running, counted up to `limit`."""
        priority, scheduled = document.get("priority", 0), document.get("scheduled_date")
        earlier: Document = {
            "status": Status.PENDING.value,
            "_id": {"$ne": document.get("_id")},
            "$expr": {"$lte": ["$scheduled_date", "$$NOW"]},
            "$or": [
                {"priority": {"$gt": priority}},
                {"priority": priority, "scheduled_date": {"$lt": scheduled}},
                {
                    "priority": priority,
                    "scheduled_date": scheduled,
                    "created_at": {"$lt": document.get("created_at")},
                },
            ],
        }
        if only:
            earlier["queue"] = {"$in": [*only, None] if "default" in only else list(only)}
        with self._jobs.operation("count"):
            return self._collection.count_documents(earlier, limit=limit)

    def states(self, job_ids: Sequence[Any]) -> dict[Any, Document]:
        """Where these jobs are now, by their `_id`, without their logs; a removed one is absent."""
        kept = {"logs": False, "env": False, "python_args": False}
        with self._jobs.operation("find"):
            return {found["_id"]: found for found in self._collection.find({"_id": {"$in": list(job_ids)}}, kept)}

    def keys(self, job_ids: Sequence[str]) -> dict[str, Any]:
        """The `_id` that each of these texts stands for; an unknown one is absent."""
        candidates = {text: possible_ids(text) for text in job_ids}
        wanted = [value for values in candidates.values() for value in values]
        with self._jobs.operation("find"):
            known = {found["_id"] for found in self._collection.find({"_id": {"$in": wanted}}, {"_id": True})}
        return {text: next(v for v in values if v in known) for text, values in candidates.items() if known & {*values}}

    def memory_by_script(
        self, *, script: str | None = None, containing: str | None = None, runs: int = HISTORY_RUNS
    ) -> list[ScriptMemory]:
        """What the last runs of each script declared and used, the most wasteful first.

        Of one script, or of those whose path contains a text. Reads the newest finished jobs only, so that its cost
        does not grow with the collection.
        """
        ended = [Status.COMPLETED.value, Status.FAILED.value]
        condition: Document = {"status": {"$in": ended}, "peak_memory": {"$type": "number"}}
        if script is not None:
            condition["python_path"] = script
        elif containing is not None:
            condition["python_path"] = {"$regex": re.escape(containing)}
        run = {
            "peak": "$peak_memory", "limit": "$required_memory", "declared": "$declared_memory",
            "kills": "$memory_kills", "status": "$status", "reason": "$reason",
        }  # fmt: skip
        newest = {"$topN": {"n": runs, "sortBy": {"created_at": -1}, "output": run}}
        stages: list[Document] = [
            {"$match": {"status": {"$in": ended}}},
            {"$sort": {"created_at": -1}},
            {"$limit": HISTORY_DOCUMENTS},
            {"$match": condition},
            {"$group": {"_id": "$python_path", "runs": newest}},
        ]
        with self._jobs.operation("memory_by_script"):
            rows = list(self._collection.aggregate(stages, allowDiskUse=True))
        found = [script_memory(str(row["_id"]), [_run(run) for run in row["runs"]]) for row in rows]
        return sorted((each for each in found if each), key=lambda each: -each.wasted_mb * each.runs)

    def missing_indexes(self) -> list[str]:
        """Names of the indexes that ought to be there and are not; none are missed where there is no job yet."""
        with self._jobs.operation("find_indexes"):
            if self._collection.find_one({}, {"_id": True}) is None:
                return []
            return schema.missing_indexes(self._collection.database, self._collection.name)

    def shared_unique_keys(self) -> dict[str, int]:
        """How many live jobs share each unique key, while its index is missing."""
        stages = [*transitions.SHARED_UNIQUE_KEYS, {"$limit": 20}]
        with self._jobs.operation("count"):
            return {str(row["_id"]): len(row["ids"]) for row in self._collection.aggregate(stages, allowDiskUse=True)}

    def unknown_statuses(self) -> dict[str, int]:
        """Documents whose status is none of ours, by status."""
        known = [status.value for status in Status]
        stages: list[Document] = [
            {"$match": {"status": {"$nin": known}}},
            {"$group": {"_id": "$status", "count": {"$sum": 1}}},
            {"$limit": 20},
        ]
        with self._jobs.operation("count"):
            return {str(row["_id"]): row["count"] for row in self._collection.aggregate(stages)}

    def server_now(self) -> datetime:
        """The server's clock, aware of UTC."""
        with self._jobs.operation("clock"):
            answer = self._collection.database.command("hello")
        now: datetime = answer["localTime"]  # commands are not decoded with the client's tz_aware
        return now.replace(tzinfo=UTC)

    def server_version(self) -> str:
        with self._jobs.operation("version"):
            return str(self._collection.database.client.server_info()["version"])

    def is_replica_set(self) -> bool:
        """Whether change streams work: a standalone server has none, and is polled."""
        with self._jobs.operation("version"):
            answer = self._collection.database.command("hello")
        return "setName" in answer or answer.get("msg") == "isdbgrid"


def _seconds_since(name: str) -> Document:
    """The age of a date; null where another program wrote something else there."""
    is_date = {"$eq": [{"$type": f"${name}"}, "date"]}
    return {"$cond": [is_date, {"$divide": [{"$subtract": ["$$NOW", f"${name}"]}, 1000]}, None]}


def _hint(name: str | None) -> Document:
    return {} if name is None else {"hint": name}


def _run(row: Document) -> Run:
    limit = _number(row.get("limit")) or DEFAULT_MEMORY_MB
    killed = row.get("reason") == Reason.MEMORY_EXCEEDED.value
    return Run(
        declared=_number(row.get("declared")) or limit,
        limit=limit,
        peak=int(row["peak"]),
        completed=row.get("status") == Status.COMPLETED.value,
        killed=killed,
        kills=max(_number(row.get("kills")), int(killed)),
    )


def _number(value: Any) -> int:
    """0 for whatever another program wrote that is none."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
