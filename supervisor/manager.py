"""The public Python API: create jobs, and lock and finish them in a worker of one's own."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from supervisor.errors import DuplicateJob, InvalidJob, JobNotFound, LeaseLost, StoreUnavailable
from supervisor.job import DEFAULT_MEMORY_MB, JobSpec
from supervisor.settings import Settings, load_settings
from supervisor.states import Status
from supervisor.store import transitions
from supervisor.store.client import connect
from supervisor.store.embedded import EmbeddedMongo
from supervisor.store.jobs import JobStore, is_unauthorized
from supervisor.store.output import OutputStore
from supervisor.store.reports import Reports
from supervisor.store.supervisors import SupervisorStore
from supervisor.store.transitions import Demand, Owner

Document = dict[str, Any]

MAX_TOKENS = 10_000
MAX_LINE = 65_536
"""Characters of a log message; what is longer is cut."""


def new_document(request_name: str, python_path: str, **fields: Any) -> Document:
    """The document of a new job; raises `InvalidJob` with the first field that is wrong."""
    unknown = sorted(set(fields) - set(JobSpec.model_fields))
    if unknown:
        raise InvalidJob(unknown[0], "is not a field of a job")
    given = {"request_name": request_name, "python_path": python_path, **fields}
    spec = JobSpec.from_document(
        {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    )
    now = datetime.now(UTC)
    document = spec.model_dump(exclude_none=True, exclude_unset=True)
    return {
        **document,
        "python_args": spec.python_args,
        "required_memory": spec.required_memory,
        "queue": spec.queue,
        "priority": spec.priority,
        "status": Status.PENDING.value,
        "created_at": now,
        "updated_at": now,
        "scheduled_date": spec.scheduled_date or now,
        "logs": [f"[{now.isoformat(timespec='milliseconds').replace('+00:00', 'Z')}] created"],
    }


class JobManager:
    """Jobs in one MongoDB collection.

    Without `mongo_uri` the settings decide: `SUPERVISOR_MONGO_URI`, else the embedded MongoDB, which is started when
    nobody else runs it. Use it as a context manager, or `close()` it. Every method raises `StoreUnavailable` when
    MongoDB cannot be reached.
    """

    def __init__(
        self,
        mongo_uri: str | None = None,
        db_name: str | None = None,
        collection_name: str | None = None,
        *,
        settings: Settings | None = None,
        selection_timeout_seconds: float = 10.0,
    ) -> None:
        settings = settings or load_settings()
        self._embedded: EmbeddedMongo | None = None
        uri = mongo_uri or settings.mongo_uri
        if not uri:
            self._embedded = EmbeddedMongo(settings.data_dir)
            self._embedded.start()
            uri = self._embedded.uri
        self._client = connect(uri, app="api", selection_timeout_seconds=selection_timeout_seconds)
        self.uri = uri
        self.jobs = JobStore(
            self._client, db_name or settings.mongo_db, collection_name or settings.mongo_collection, uri=uri
        )
        self.output = OutputStore(self.jobs)
        self.reports = Reports(self.jobs)
        self.supervisors = SupervisorStore(self.jobs)
        self._indexed = False
        self._tokens: dict[Any, str] = {}
        """Of the jobs that this object has locked, also when it has given them up: then they match nothing more."""
        host = socket.gethostname()
        name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._owner = Owner(supervisor_id=name, host=host, worker_pid=os.getpid(), worker=name)

    def create_job(
        self,
        request_name: str,
        python_path: str | os.PathLike[str],
        python_args: Sequence[str] | None = None,
        required_memory: int = DEFAULT_MEMORY_MB,
        scheduled_date: datetime | None = None,
        **optional: Any,
    ) -> str:
        """Inserts a pending job and returns its id.

        `required_memory` is in MB; a `scheduled_date` without a time zone is UTC; `optional` takes the other fields of
        a job (`queue`, `priority`, `timeout`, `max_attempts`, …). Raises `InvalidJob` with the name of a wrong field,
        and `DuplicateJob` when a pending or running job has the same `unique_key`.
        """
        self._ensure_indexes()
        document = new_document(
            request_name,
            os.fspath(python_path) if isinstance(python_path, os.PathLike) else python_path,
            python_args=[] if python_args is None else python_args,
            required_memory=required_memory,
            scheduled_date=scheduled_date,
            **optional,
        )
        return str(self.jobs.insert(document))

    def create_jobs(self, documents: Sequence[Document]) -> list[DuplicateJob]:
        """Inserts documents of `new_document` in bulk; returns the refusals of those whose unique key is taken.

        Each inserted document has its `_id` afterwards, as the refused ones have.
        """
        self._ensure_indexes()
        return self.jobs.insert_many(documents) if documents else []

    def find_and_lock_job(self, lease_seconds: float = 3600) -> Document | None:
        """Locks the first due job for `lease_seconds` and returns its document, or None when nothing is due.

        One atomic `find_one_and_update`. Nobody renews the lease: a job that is not finished in time is taken back.
        """
        self._ensure_indexes()
        token = secrets.token_hex(16)
        self.jobs.adopt()  # where no supervisor runs, nobody else gives documents of other programs their place
        document = self.jobs.claim(self._owner, token, Demand(), lease_seconds)
        if document is not None:
            self._remember(document["_id"], token)
        return document

    def _remember(self, key: Any, token: str) -> None:
        self._tokens.pop(_hashable(key), None)
        self._tokens[_hashable(key)] = token
        if len(self._tokens) > MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]

    def update_job_status(self, job_id: Any, status: Status | str, log_message: str) -> None:
        """Makes a move of a job's status and appends a line to its log.

        If this object locked the job, the write holds only while that lock does. If it did not, the job must be
        where such a move can begin, and not be held by a supervisor. Raises `LeaseLost` otherwise, `JobNotFound` for
        an unknown id, and `InvalidJob` for an unknown status or a message that is no text.
        """
        try:
            status = Status(status)
        except ValueError:
            raise InvalidJob("status", f"{status!r} is none of {', '.join(Status)}") from None
        found = self.jobs.find(job_id, {"_id": True})
        if found is None:
            raise JobNotFound(f"there is no job {job_id}")
        token = self._tokens.get(_hashable(found["_id"]))
        if not self.jobs.change(transitions.set_status(found["_id"], token, status, _line(log_message)), "update"):
            raise LeaseLost(self._why_not(found["_id"], token, status))

    def _why_not(self, key: Any, token: str | None, status: Status) -> str:
        if token is not None:
            return f"job {key} is no longer held by this worker"
        document = self.get_job(key)
        if document.get("status") == Status.RUNNING and status is not Status.RUNNING:
            return f"job {key} is run by a supervisor: only `cancel_job` stops it"
        return f"job {key} is {document.get('status')}: it cannot become {status}"

    def get_job(self, job_id: Any) -> Document:
        """The job's document; raises `JobNotFound`."""
        found = self.jobs.find(job_id)
        if found is None:
            raise JobNotFound(f"there is no job {job_id}")
        return found

    def cancel_job(self, job_id: Any) -> Status:
        """Cancels a pending job, or asks the supervisor of a running one to stop it; returns the status it has now."""
        for _ in range(10):  # a job may start between the look and the write
            document = self.get_job(job_id)
            key, status = document["_id"], document.get("status")
            if status == Status.PENDING and self.jobs.change(transitions.cancel_pending(key), "cancel"):
                return Status.CANCELLED
            if status == Status.RUNNING:
                if not isinstance(document.get("lock"), Mapping):
                    raise LeaseLost(f"job {job_id} is run by another program, which holds no lease: stop it there")
                if self.jobs.change(transitions.request_cancel(key), "cancel"):
                    return Status.RUNNING
            if status not in (Status.PENDING, Status.RUNNING):
                raise LeaseLost(f"job {job_id} is already {status}")
        raise LeaseLost(f"job {job_id} changes too fast to be cancelled")

    def retry_job(self, job_id: Any) -> None:
        """Makes a finished job pending again, due now; raises `DuplicateJob` when its unique key is taken meanwhile."""
        document = self.get_job(job_id)
        if not self.jobs.change(transitions.retry(document["_id"]), "retry"):
            raise LeaseLost(f"job {job_id} is {document.get('status')}: only a finished job can be retried")

    def close(self) -> None:
        """Closes the connection, and ends the embedded MongoDB if nobody else uses it."""
        self._client.close()
        if self._embedded is not None:
            self._embedded.stop()
            self._embedded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ensure_indexes(self) -> None:
        if self._indexed:
            return
        try:
            self.jobs.ensure_indexes()
        except StoreUnavailable as error:
            if not is_unauthorized(error):  # a producer's role does not allow it: the supervisors make them
                raise
        self._indexed = True


def _hashable(key: Any) -> Any:
    """Ids of other programs may be documents."""
    return key if isinstance(key, Hashable) else repr(key)


def _line(message: Any) -> str:
    if not isinstance(message, str):
        raise InvalidJob("log_message", f"must be text, not {message!r:.60}")
    text = message.encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}\n[… cut]"


__all__ = ["JobManager", "new_document"]
