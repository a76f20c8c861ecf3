"""The words of a job's life: its statuses and the reasons why an attempt did not succeed. Standard library only."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Where a job is in its life; the last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Reason(StrEnum):
    """Why the last attempt did not succeed."""

    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    MEMORY_EXCEEDED = "memory_exceeded"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    INVALID_JOB = "invalid_job"
    START_FAILED = "start_failed"
    LOST = "lost"


class Ending(StrEnum):
    """How the process of an attempt came to its end, as its runner saw it."""

    EXITED = "exited"
    MEMORY_EXCEEDED = "memory_exceeded"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    START_FAILED = "start_failed"
    INTERRUPTED = "interrupted"
    """Stopped by a shutdown: handed back, not failed."""
    LEASE_ENDED = "lease_ended"
    """Stopped because the right to run it could not be renewed in time."""
