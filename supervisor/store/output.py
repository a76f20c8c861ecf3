"""What jobs print, in chunks: `job_logs` holds the first and the last part of each attempt's output.

A chunk is `{job_id, attempt, seq, stream, offset, at, data}`; `seq` counts over both streams in the order of arrival,
`offset` within one stream, so that a reader sees where something was left out. Sending a chunk twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from bson import Binary
from pymongo import ASCENDING, InsertOne
from pymongo.errors import BulkWriteError

from supervisor.output import Chunk
from supervisor.store import schema
from supervisor.store.client import first_failure
from supervisor.store.jobs import JobStore

DUPLICATE_KEY = 11000


class OutputStore:
    """The collection of output chunks."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._collection = jobs.collection.database[schema.OUTPUT_COLLECTION]

    def append(self, job_id: Any, attempt: int, chunks: Sequence[Chunk], removed: Sequence[int] = ()) -> None:
        """Stores chunks of an attempt, and removes those (by `seq`) that fell out of what is kept."""
        self.append_all([(job_id, attempt, chunks)])
        if removed:
            with self._jobs.operation("output"):
                self._collection.delete_many({"job_id": job_id, "attempt": attempt, "seq": {"$in": list(removed)}})

    def append_all(self, attempts: Sequence[tuple[Any, int, Sequence[Chunk]]]) -> None:
        """Stores chunks of several attempts (job id, attempt, chunks) in one round trip."""
        at = datetime.now(UTC)
        writes = [
            InsertOne(
                {
                    "job_id": job_id,
                    "attempt": attempt,
                    "seq": chunk.seq,
                    "stream": chunk.stream,
                    "offset": chunk.offset,
                    "at": at,
                    "data": Binary(chunk.data),
                }
            )
            for job_id, attempt, chunks in attempts
            for chunk in chunks
        ]
        if not writes:
            return
        with self._jobs.operation("output"):
            try:
                self._collection.bulk_write(writes, ordered=False)
            except BulkWriteError as error:
                failure = first_failure(error, ignoring=DUPLICATE_KEY)  # those have been stored before
                if failure is not None:
                    raise failure from None

    def read(self, job_id: Any, attempt: int, *, after_seq: int = -1) -> Iterator[Chunk]:
        """The kept chunks of an attempt behind `after_seq`, in the order of their arrival."""
        condition = {"job_id": job_id, "attempt": attempt, "seq": {"$gt": after_seq}}
        with self._jobs.operation("read_output"):
            for found in self._collection.find(condition).sort("seq", ASCENDING):
                yield Chunk(found["seq"], found["stream"], found["offset"], bytes(found["data"]))

    def attempts(self, job_id: Any) -> list[int]:
        """The attempts of a job that have printed something."""
        with self._jobs.operation("read_output"):
            return sorted(self._collection.distinct("attempt", {"job_id": job_id}))
