"""One attempt of a job: what its worker knows of it while it runs, and what is said of it when it is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from supervisor.job import Counts, JobSpec, Outcome, Verdict
from supervisor.messages import ClaimedJob, Ended, FinishedJob
from supervisor.output import Chunk, OutputCapture
from supervisor.states import Ending
from supervisor.store.transitions import Move

SAMPLES_KEPT = 64
MAX_STEP_SECONDS = 1.0


class ServerClock:
    """MongoDB's clock, as far as claims tell of it: jobs say when they began and ended on one clock for all hosts.

    A claim names a moment after it was sent, so what is told here is never early, and late by less than the shortest
    round trip. A moment that lies further off was told by another server.
    """

    def __init__(self) -> None:
        self._offset: float | None = None

    def compare(self, sent: float, moment: datetime) -> None:
        """`moment` on the server's clock was after `sent` on ours."""
        offset = moment.timestamp() - sent
        if self._offset is None or offset < self._offset or offset - self._offset > MAX_STEP_SECONDS:
            self._offset = offset

    def milliseconds(self, at: float) -> int:
        """A moment on our clock as milliseconds since 1970 on the server's."""
        assert self._offset is not None
        return round((self._offset + at) * 1000)


@dataclass(slots=True)
class Attempt:
    """A job that this worker holds."""

    document: dict[str, Any]
    grant: int
    deadline: float
    counts: Counts
    ahead: bool
    """Claimed ahead of others: MongoDB counts the attempt only once it has started."""
    spec: JobSpec | None = None
    script: str = ""
    output: OutputCapture | None = None
    unsent: list[Chunk] = dataclasses.field(default_factory=list)
    """Output that MongoDB did not take while the job ran: it goes with the outcome."""
    unremoved: list[int] = dataclasses.field(default_factory=list)
    """Chunks (by `seq`) that MongoDB still has to drop."""
    ended: Ended | None = None

    @property
    def key(self) -> Any:
        return self.document["_id"]

    @property
    def job_id(self) -> str:
        return str(self.document["_id"])

    @property
    def token(self) -> str:
        token: str = self.document["lock"]["token"]
        return token

    @property
    def number(self) -> int:
        return self.counts.attempts + 1 if self.ahead else self.counts.attempts

    def ran(self, server: ServerClock) -> tuple[int, int] | None:
        """When it began and ended, in milliseconds on the server's clock; None when it never started."""
        if self.ended is None or not self.ended.gone:
            return None
        return server.milliseconds(self.ended.began), server.milliseconds(self.ended.gone)

    def claimed(self) -> ClaimedJob:
        queue = self.document.get("queue")
        return ClaimedJob(
            token=self.token,
            job_id=self.job_id,
            attempt=self.number,
            queue=queue if isinstance(queue, str) else "default",
            memory_mb=self.spec.required_memory if self.spec else 0,
            wait_seconds=self._waited(),
        )

    def _waited(self) -> float:
        """Seconds from when the job was due to its claim, both on the server's clock."""
        try:
            waited: float = (self.document["lock"]["locked_at"] - self.document["scheduled_date"]).total_seconds()
            return max(0.0, waited)
        except (KeyError, TypeError):
            return 0.0

    def details(self) -> dict[str, Any]:
        """Further fields of the document."""
        if self.ended is None:
            return {}
        details: dict[str, Any] = {"duration_seconds": round(self.ended.duration_seconds, 3)}
        if len(self.ended.samples) > 1:
            details["memory_samples"] = [list(sample) for sample in self.ended.samples[-SAMPLES_KEPT:]]
        return details

    def story(self, outcome: Outcome, verdict: Verdict) -> list[str]:
        """The lines of the job's log about this attempt: how it ended, what it printed."""
        ended = self.ended
        if ended is None:
            return [verdict.note]
        facts = [f"after {ended.duration_seconds:.2f} s"]
        if outcome.exit_code is not None:
            facts.append(f"exit code {outcome.exit_code}")
        if outcome.peak_memory_mb is not None:
            facts.append(f"peak memory {outcome.peak_memory_mb} MB")
        if ended.leftovers:
            facts.append(f"ended {ended.leftovers} processes that it had left running")
        blocks = self.output.blocks() if self.output is not None else []
        return [*ended.story, f"{verdict.note} ({', '.join(facts)})", *blocks]


@dataclass(frozen=True, slots=True)
class Result:
    """How an attempt ended, with everything that is to be written of it."""

    attempt: Attempt
    outcome: Outcome
    verdict: Verdict
    move: Move
    chunks: list[Chunk]
    removed: list[int]

    def all_chunks(self) -> list[Chunk]:
        """What MongoDB still lacks of the attempt's output."""
        return without(self.attempt.unsent, self.removed) + self.chunks

    def finished(self, *, held: bool, spooled: bool) -> FinishedJob:
        attempt, outcome, ended = self.attempt, self.outcome, self.attempt.ended
        return FinishedJob(
            token=attempt.token,
            job_id=attempt.job_id,
            attempt=attempt.number,
            status=self.verdict.status.value,
            reason=outcome.reason.value if outcome.reason else None,
            error=outcome.error,
            exit_code=outcome.exit_code,
            duration_seconds=ended.duration_seconds if ended else 0.0,
            peak_memory_mb=outcome.peak_memory_mb,
            kill_delay_seconds=ended.kill_delay_seconds if ended else None,
            held=held,
            spooled=spooled,
            cause="lease_expired" if ended and ended.ending == Ending.LEASE_ENDED else "shutdown",
        )

    def spooled(self) -> dict[str, Any]:
        """The record of an outcome that waits on disk. Its job is found by the token: ids need not be JSON."""
        chunks = self.all_chunks()
        return {
            "token": self.attempt.token,
            "job_id": self.attempt.job_id,
            "attempt": self.attempt.number,
            "update": self.move.update,
            "chunks": [{**dataclasses.asdict(chunk), "data": chunk.data.decode("latin-1")} for chunk in chunks],
        }


def without(chunks: Iterable[Chunk], removed: Iterable[int]) -> list[Chunk]:
    """The chunks but those that are to be dropped again."""
    gone = set(removed)
    return [chunk for chunk in chunks if chunk.seq not in gone]
