"""Learns at once that a job has become pending or is to be cancelled: one change stream for each supervisor.

Only a hint: no position is stored, every error reopens the stream after a pause, and whoever listens must look at the
queue once after each opening and every few seconds anyway. A standalone server has no change streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from threading import Event
from typing import Any

from pymongo.collection import Collection
from pymongo.errors import OperationFailure, PyMongoError

from supervisor.states import Status
from supervisor.store.jobs import JobStore

Document = dict[str, Any]
MAX_WAIT_MS = 5_000
"""How long the server holds an empty answer back: the pace of an idle stream."""
_NO_CHANGE_STREAMS = {40573, 59, 40324}


@dataclass(frozen=True, slots=True)
class BecamePending:
    """A job was inserted, or went back to pending."""

    queue: str | None
    scheduled_date: datetime | None
    is_complete: bool
    """Whether it has the fields that the order of running needs; documents of other programs may lack them."""
    is_odd: bool
    """Whether what claims compare has an unusual type: maybe no claim would ever find it."""
    at: datetime | None
    """The server's time of the change."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody asked to cancel the running job with this token."""

    token: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream is open: what came before was not seen."""


Change = BecamePending | CancelAsked | Opened

_PIPELINE: list[Document] = [
    {
        "$match": {
            "$or": [
                {"operationType": "insert"},
                {"operationType": {"$in": ["update", "replace"]}, "updateDescription.updatedFields.status": "pending"},
                {"operationType": "update", "updateDescription.updatedFields.cancel_requested": True},
                {"operationType": "replace", "fullDocument.status": "pending"},
            ]
        }
    },
    {
        "$project": {
            "operationType": 1,
            "wallTime": 1,
            "clusterTime": 1,
            "fullDocument.status": 1,
            "fullDocument.queue": 1,
            "fullDocument.priority": 1,
            "fullDocument.scheduled_date": 1,
            "fullDocument.required_memory": 1,
            "fullDocument.lock.token": 1,
            "updateDescription.updatedFields.scheduled_date": 1,
            "updateDescription.updatedFields.cancel_requested": 1,
            "updateDescription.updatedFields.status": 1,
            "documentKey": 1,
        }
    },
]


class ChangesUnavailable(Exception):
    """This server has no change streams."""


class JobChanges:
    """The stream of changes that concern a supervisor."""

    def __init__(self, jobs: JobStore) -> None:
        self._collection: Collection[Document] = jobs.collection

    def listen(self, handle: Callable[[Change], None], stop: Event) -> None:
        """Calls `handle` with every change until `stop` is set or the stream breaks.

        Raises `ChangesUnavailable` where there are no change streams, and `PyMongoError` when the stream broke.
        """
        try:
            with self._collection.watch(_PIPELINE, max_await_time_ms=MAX_WAIT_MS) as stream:
                handle(Opened())
                while not stop.is_set() and stream.alive:
                    event = stream.try_next()
                    if event is not None:
                        change = self._read(event)
                        if change is not None:
                            handle(change)
        except OperationFailure as error:
            if error.code in _NO_CHANGE_STREAMS:
                raise ChangesUnavailable from None
            raise

    def _read(self, event: Document) -> Change | None:
        updated = event.get("updateDescription", {}).get("updatedFields", {})
        if updated.get("cancel_requested") is True:
            return self._cancel_asked(event["documentKey"]["_id"])
        document = event.get("fullDocument") or {}
        at = event.get("wallTime")
        if event["operationType"] == "update":
            scheduled = updated.get("scheduled_date")
            return BecamePending(
                queue=None,
                scheduled_date=scheduled if isinstance(scheduled, datetime) else None,
                is_complete=True,
                is_odd=False,
                at=at,
            )
        if document.get("status") not in (None, Status.PENDING.value):
            return None
        scheduled = document.get("scheduled_date")
        queue, memory = document.get("queue"), document.get("required_memory")
        return BecamePending(
            queue=queue if isinstance(queue, str) else None,
            scheduled_date=scheduled if isinstance(scheduled, datetime) else None,
            is_complete="priority" in document and "status" in document,
            is_odd=not (isinstance(scheduled, datetime | None) and (memory is None or _is_whole(memory))),
            at=at if at is not None else None,
        )

    def _cancel_asked(self, job_id: Any) -> CancelAsked | None:
        document = self._collection.find_one({"_id": job_id}, {"lock.token": True})
        token = ((document or {}).get("lock") or {}).get("token")
        return CancelAsked(token) if isinstance(token, str) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2.0**63)


__all__ = [
    "BecamePending", "CancelAsked", "Change", "ChangesUnavailable", "JobChanges", "Opened", "PyMongoError",
]  # fmt: skip
