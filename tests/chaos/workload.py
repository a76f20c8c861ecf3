"""What is run: a seeded list of jobs of several kinds, each with what it may come to."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bson import ObjectId
from pymongo.errors import ConnectionFailure, DuplicateKeyError, OperationFailure, PyMongoError

from supervisor.job import MAX_LOSSES
from supervisor.manager import JobManager, new_document
from tests.chaos.history import Document

SCRIPT = Path(__file__).with_name("job.py")
KINDS = ("short", "long", "lasting", "flaky", "hog", "forking", "daemonizing", "hiding", "stubborn", "talking")


@dataclass(frozen=True, slots=True)
class Planned:
    """One job: its kind, its argument, its fields, and the outcome that it has when nothing is lost."""

    kind: str
    argument: float = 0.0
    memory_mb: int = 64
    weight: int = 1
    max_attempts: int = 1
    timeout: float | None = None
    status: str = "completed"
    reason: str | None = None
    failures: int = 0
    start_method: str | None = None

    def allows(self, document: Document) -> bool:
        """Whether the final document is one that this job may come to."""
        if document.get("reason") == "lost":
            return bool(document["status"] == "failed" and document.get("losses", 0) >= MAX_LOSSES)
        if (document["status"], document.get("reason")) != (self.status, self.reason):
            return False
        # A failure whose report was lost counts as a loss instead; a script that counts for itself goes on.
        failures = document.get("failures", 0)
        return bool(failures == self.failures if self.status == "failed" else failures <= self.failures)


def _kinds(generator: random.Random, lease_seconds: float) -> list[Planned]:
    """One of each kind. Lasting ones outlast their first lease: it must be renewed."""
    seconds = round(generator.uniform(0.2, 2.0), 2)
    lasting_seconds = round(generator.uniform(lease_seconds, 2 * lease_seconds), 2)
    failures = generator.choice([1, 2])
    return [
        Planned("short", weight=40),
        Planned("short", weight=6, start_method="exec"),
        Planned("long", seconds, weight=14),
        Planned("lasting", lasting_seconds, weight=3),
        Planned("flaky", failures, max_attempts=3, failures=failures, weight=6),
        Planned("flaky", 99, max_attempts=2, failures=2, status="failed", reason="exit_code", weight=4),
        Planned("hog", 256, status="failed", reason="memory_exceeded", failures=1, weight=3),
        Planned("forking", seconds, memory_mb=128, weight=7),
        Planned("daemonizing", seconds / 2, memory_mb=128, weight=6),
        Planned("hiding", seconds / 2, memory_mb=128, weight=6),
        Planned("stubborn", seconds, weight=4),
        Planned("stubborn", 60, timeout=0.5, status="failed", reason="timeout", failures=1, weight=4),
        Planned("talking", round(generator.uniform(0.1, 2.0), 1), weight=4),
    ]


def plan(seed: int, count: int, *, lease_seconds: float, kinds: Collection[str]) -> list[Planned]:
    """The jobs of a run, of these kinds."""
    generator = random.Random(f"workload {seed}")
    planned = []
    for _ in range(count):
        candidates = [each for each in _kinds(generator, lease_seconds) if each.kind in kinds]
        planned.append(generator.choices(candidates, weights=[each.weight for each in candidates])[0])
    return planned


def document_of(planned: Planned, records: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "python_args": [str(records), planned.kind, str(planned.argument)],
        "required_memory": planned.memory_mb,
        "max_attempts": planned.max_attempts,
        "retry_delay": 0.1,
    }
    if planned.timeout is not None:
        fields["timeout"] = planned.timeout
    if planned.start_method is not None:
        fields["start_method"] = planned.start_method
    return {"_id": ObjectId(), **new_document(planned.kind, str(SCRIPT), **fields)}


def submit(manager: JobManager, documents: list[Document]) -> Iterator[str]:
    """Inserts the documents until each is acknowledged; yields their ids."""
    for document in documents:
        while True:
            try:
                manager.jobs.collection.insert_one(document)
            except DuplicateKeyError:
                pass  # the answer to an earlier try was lost
            except (ConnectionFailure, OperationFailure) as error:
                if not _passes(error):
                    raise
                continue
            yield str(document["_id"])
            break


def _passes(error: PyMongoError) -> bool:
    from supervisor.store.client import is_passing

    return is_passing(error)
