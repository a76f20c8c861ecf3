"""Who supervises: one document for each supervisor, renewed while it lives.

It identifies the process beyond doubt (boot, PID namespace, PID and start time), so that its successor on the same
host can tell that it is dead without waiting for leases to end; and it is what `status` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from supervisor.processes import ProcessRef, boot_id, pid_namespace
from supervisor.store import schema
from supervisor.store.jobs import JobStore

Document = dict[str, Any]
LIVE_SECONDS = 35.0
"""A supervisor that was not seen for this long counts as gone in what people are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a supervisor is, as a process."""

    supervisor_id: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: float

    @classmethod
    def of_process(cls, supervisor_id: str, host: str, pid: int) -> Identity:
        return cls(
            supervisor_id=supervisor_id,
            host=host,
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            pid=pid,
            started=ProcessRef.of(pid).started,
        )


class SupervisorStore:
    """The collection of supervisors."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._collection = jobs.collection.database[schema.SUPERVISORS_COLLECTION]

    def register(self, identity: Identity, facts: Mapping[str, Any]) -> None:
        """Writes that this supervisor lives, and what it is at; makes its document when that is gone."""
        fields = {name: value for name, value in asdict(identity).items() if name != "supervisor_id"}
        values = {name: {"$literal": value} for name, value in {**fields, **facts}.items()}
        values["jobs_collection"] = {"$literal": self._jobs.collection.name}
        first = {"started_at": {"$ifNull": ["$started_at", "$$NOW"]}, "seen_at": "$$NOW"}
        with self._jobs.operation("register"):
            self._collection.update_one({"_id": identity.supervisor_id}, [{"$set": {**values, **first}}], upsert=True)

    def remove(self, supervisor_id: str) -> None:
        with self._jobs.operation("register"):
            self._collection.delete_one({"_id": supervisor_id})

    def all(self) -> list[Document]:
        """Every known supervisor of this collection, with `age_seconds` since it was last seen and `live`."""
        is_date = {"$eq": [{"$type": "$seen_at"}, "date"]}
        age = {"$cond": [is_date, {"$divide": [{"$subtract": ["$$NOW", "$seen_at"]}, 1000]}, None]}
        stages: list[Document] = [
            {"$match": {"jobs_collection": self._jobs.collection.name}},
            {"$set": {"age_seconds": age}},
            {"$sort": {"host": 1, "started_at": 1}},
        ]
        with self._jobs.operation("find_supervisors"):
            found = list(self._collection.aggregate(stages))
        for document in found:
            age_seconds = document.get("age_seconds")
            document["live"] = isinstance(age_seconds, int | float) and age_seconds < LIVE_SECONDS
        return found

    def dead_on(self, identity: Identity) -> list[str]:
        """Supervisors of this very kernel and PID namespace whose process is provably gone.

        What ran before a reboot or in another container is left to the end of its leases: two hosts may share a name.
        """
        condition = {
            "host": identity.host,
            "boot_id": identity.boot_id,
            "pid_namespace": identity.pid_namespace,
            "_id": {"$ne": identity.supervisor_id},
            "pid": {"$type": "number"},
            "started": {"$type": "number"},
        }
        with self._jobs.operation("find_supervisors"):
            others = list(self._collection.find(condition))
        return [str(other["_id"]) for other in others if not _process_of(other).is_alive()]


def _process_of(document: Mapping[str, Any]) -> ProcessRef:
    return ProcessRef(int(document["pid"]), document["started"])
