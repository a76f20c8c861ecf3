"""The right to run a job, from the database's side: renewed while the job runs, taken back when its owner is gone.

Every duty is one `…_once()` that the keeper's loop calls. After MongoDB was away, expired leases are left alone for
one more lease: their owners get the time to renew them, and to write the results that waited on their disks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from supervisor.errors import StoreUnavailable
from supervisor.events import Logger, logger
from supervisor.output import Chunk
from supervisor.processes import clock
from supervisor.spool import Spool
from supervisor.states import Status
from supervisor.store import transitions
from supervisor.store.jobs import JobStore, is_refusal
from supervisor.store.output import OutputStore
from supervisor.store.supervisors import Identity, SupervisorStore

Cause = Literal["startup", "lease_expired", "worker_died", "shutdown"]


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal came to: who holds until when, and who does not any more."""

    kept: list[str]
    deadline: float
    lost: list[str]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What became of jobs that were taken back: how many run again, and (status, reason) of those that do not."""

    pending: int = 0
    ended: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: Reclaimed) -> Reclaimed:
        return Reclaimed(self.pending + other.pending, self.ended + other.ended)


class LeaseKeeper:
    """One supervisor's leases."""

    def __init__(
        self,
        jobs: JobStore,
        outputs: OutputStore,
        supervisors: SupervisorStore,
        spool: Spool,
        *,
        identity: Identity,
        lease_seconds: float,
        margin_seconds: float,
        end_orphans: Callable[[], int] = int,
        log: Logger | None = None,
    ) -> None:
        self._jobs = jobs
        self._outputs = outputs
        self._supervisors = supervisors
        self._spool = spool
        self._identity = identity
        self._lease_seconds = lease_seconds
        self._margin_seconds = margin_seconds
        self._end_orphans = end_orphans
        self._buried: set[str] = set()
        self._log = log or logger("leases")
        self._reclaim_from = 0.0

    def renew_once(self, tokens: Sequence[str]) -> Renewal:
        """Renews the leases of these claims. The local deadline counts from before the request was sent."""
        spooled = self._spool.names()
        sent = clock()
        lost = self._jobs.renew(self._identity.supervisor_id, [*tokens, *spooled], self._lease_seconds)
        gone = [token for token in tokens if token in lost]
        kept = [token for token in tokens if token not in lost]
        return Renewal(kept, sent + self._lease_seconds - self._margin_seconds, gone)

    def has_waiting_results(self) -> bool:
        """Whether results wait on disk: their jobs' leases are renewed, too."""
        return bool(self._spool.names())

    def replay_once(self) -> int:
        """Writes the results that waited on disk, under the condition that they were made for; returns how many."""
        written = 0
        for token, record in self._spool.records():
            try:
                if record is None:
                    raise ValueError("not JSON")
                written += self._replay(token, record)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                self._log.error("spooled_result_unreadable", token=token, error=error)
                self._spool.set_aside(token)
            except StoreUnavailable as error:
                if not is_refusal(error):
                    raise
                self._log.error("spooled_result_refused", token=token, error=error)
                self._spool.set_aside(token)
            else:
                self._spool.remove(token)
        return written

    def _replay(self, token: str, record: dict[str, Any]) -> bool:
        document = self._jobs.claimed_with(token)
        if document is None:
            self._log.warning("spooled_result_too_late", job_id=record["job_id"], attempt=record["attempt"])
            return False
        chunks = [
            Chunk(chunk["seq"], chunk["stream"], chunk["offset"], chunk["data"].encode("latin-1"))
            for chunk in record["chunks"]
        ]
        self._outputs.append(document["_id"], record["attempt"], chunks)
        move = transitions.Move(transitions.held(document["_id"], token), record["update"])
        held = self._jobs.apply(move, "finish")
        self._log.info("spooled_result_written", job_id=record["job_id"], attempt=record["attempt"], held=held)
        return held

    def reclaim_startup_once(self) -> Reclaimed:
        """Takes back what dead supervisors of this host left running, once their processes are gone."""
        dead = self.end_orphans_once()
        if not dead:
            return Reclaimed()
        reclaimed = self._lose(transitions.of_supervisors(dead), "startup", "its supervisor died")
        for supervisor_id in dead:
            self._supervisors.remove(supervisor_id)
        return reclaimed

    def end_orphans_once(self) -> list[str]:
        """Ends the processes of supervisors of this host that died since the last time; returns all dead ones.

        Their leases are about to end, and nobody else could know that their jobs still run.
        """
        dead = self._supervisors.dead_on(self._identity)
        if not self._buried.issuperset(dead):
            self._end_orphans()
            self._buried.update(dead)
        return dead

    def reclaim_worker_once(self, worker: str, cause: Cause) -> Reclaimed:
        """Takes back what a dead worker of this supervisor held."""
        condition = transitions.of_worker(self._identity.supervisor_id, worker)
        return self._lose(condition, cause, "its worker died")

    def reclaim_expired_once(self) -> Reclaimed:
        """Takes back every lease that has ended, whoever held it, and what other programs abandoned."""
        if clock() < self._reclaim_from:
            return Reclaimed()
        expired = self._lose(transitions.expired(), "lease_expired", "its lease was not renewed")
        why = "its worker has no lease and was silent for an hour"
        return expired + self._lose(transitions.abandoned_by_others(), "lease_expired", why)

    def was_away(self) -> None:
        """MongoDB is back after an outage."""
        self._reclaim_from = clock() + self._lease_seconds

    def _lose(self, condition: dict[str, Any], cause: Cause, why: str) -> Reclaimed:
        lost = self._jobs.lose(condition, why)
        for document in lost:
            self._log.warning(
                "job_reclaimed",
                job_id=str(document["_id"]),
                attempt=document.get("attempts"),
                cause=cause,
                status=document.get("status"),
            )
        pending = sum(document["status"] == Status.PENDING for document in lost)
        ended = [(document["status"], document["reason"]) for document in lost if document["status"] != Status.PENDING]
        return Reclaimed(pending, ended)
