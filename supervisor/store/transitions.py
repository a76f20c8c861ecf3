"""Each move of a job's status as one conditional write: a filter, and a pipeline that the server applies atomically.

Pure functions, no I/O. Every time is the server's (`$$NOW`): the clocks of hosts do not matter. Every move away from
`running` carries the token of its claim, so that a writer whose lease was taken over matches nothing. Documents may
come from other programs, so that no field is trusted to have its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bson import MinKey

from supervisor.job import DEFAULT_MEMORY_MB, MAX_LOSSES, Outcome, Verdict
from supervisor.states import Reason, Status

Document = dict[str, Any]
Pipeline = list[Document]

KEPT_LOG_ENTRIES = 500
KEPT_ENTRY_BYTES = 4096
"""Log entries of earlier attempts are cut to this, so that no number of attempts nears the 16 MB of a document."""

LONGEST_TOGETHER = 100_000
"""Characters of log lines: some dozens of such moves are far from the 16 MB of a statement."""

_REMOVED_WITH_THE_LOCK = ["lock", "cancel_requested"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a first attempt that has completed leaves on its document: constants, and lines for the log."""

    fields: Document
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Move:
    """One conditional write. With a `completion`, it can be made `together` with others."""

    filter: Document
    update: Pipeline
    completion: Completion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who claims."""

    supervisor_id: str
    host: str
    worker_pid: int
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Which jobs a claim may take."""

    queues: Sequence[str] = ()
    """Empty: all queues."""
    limit_mb: int | None = None
    exclude: Sequence[Any] = field(default=())


def literal(value: Any) -> Document:
    """A constant: text that begins with `$` must not be read as the name of a field."""
    return {"$literal": value}


def number(name: str) -> Document:
    return {"$cond": [{"$isNumber": f"${name}"}, f"${name}", 0]}


def add_one(name: str) -> Document:
    return {"$add": [number(name), 1]}


def counters() -> Document:
    """Those that are not there yet begin with 0."""
    return {name: number(name) for name in ("failures", "interruptions", "losses")}


def entry(text: str) -> Document:
    """One line of the job's log, stamped by the server."""
    stamp = {"$dateToString": {"date": "$$NOW", "format": "%Y-%m-%dT%H:%M:%S.%LZ"}}
    return {"$concat": ["[", stamp, "] ", literal(text)]}


def with_entries(texts: Iterable[str]) -> Document:
    """The job's log with further lines."""
    return with_lines([entry(text) for text in texts])


def with_lines(lines: Any) -> Document:
    """The same, with lines that are stamped already."""
    logs = {"$cond": [{"$isArray": "$logs"}, "$logs", []]}
    return {"$concatArrays": [{"$slice": [logs, -KEPT_LOG_ENTRIES]}, lines]}


def with_entries_after_cut(texts: Iterable[str]) -> Document:
    """The same, with long entries of earlier attempts cut."""
    is_text = {"$eq": [{"$type": "$$line"}, "string"]}
    is_long = {
        "$and": [
            is_text,
            {"$gt": [{"$strLenBytes": {"$cond": [is_text, "$$line", ""]}}, 2 * KEPT_ENTRY_BYTES]},
        ]
    }  # fmt: skip
    cut = {"$concat": [{"$substrCP": ["$$line", 0, KEPT_ENTRY_BYTES]}, "\n[… cut; see the output of that attempt]"]}
    logs = {"$cond": [{"$isArray": "$logs"}, "$logs", []]}
    shortened = {
        "$map": {
            "input": {"$slice": [logs, -KEPT_LOG_ENTRIES]},
            "as": "line",
            "in": {"$cond": [is_long, cut, "$$line"]},
        }
    }
    return {"$concatArrays": [shortened, [entry(text) for text in texts]]}


# -- pending → running ------------------------------------------------------------------------------------------------


def due(demand: Demand) -> Document:
    """What may be claimed. `$expr` compares across types: a missing or unreadable date counts as due, and is then
    refused at the door instead of waiting for ever; `$not: {$gt}` does the same for `required_memory`."""
    condition: Document = {
        "status": Status.PENDING.value,
        "priority": {"$gte": MinKey()},  # true of all: without it the index is read through, not searched
        "$expr": {"$lte": ["$scheduled_date", "$$NOW"]},
    }
    if demand.queues:
        names: list[Any] = list(demand.queues)
        condition["queue"] = {"$in": [*names, None] if "default" in names else names}
    if demand.limit_mb is not None:
        condition["required_memory"] = {"$not": {"$gt": demand.limit_mb}}
    if demand.exclude:
        condition["_id"] = {"$nin": list(demand.exclude)}
    return condition


def claim_update(
    owner: Owner, token: str, lease_seconds: float, *, ahead: bool = False, sure_mb: int | None = None
) -> Pipeline:
    """Locks a job. One that is claimed `ahead` of others has not started yet: its attempt is counted when it does,
    and its token ends in its id, so that the jobs of one statement have tokens of their own. One that needs more
    than `sure_mb` may have to go back (with 0, any job): it, too, is counted when it starts."""
    waits: Any = {"$gt": ["$required_memory", sure_mb]} if sure_mb else sure_mb is not None
    lock = {
        "supervisor_id": literal(owner.supervisor_id),
        "host": literal(owner.host),
        "worker_pid": owner.worker_pid,
        "worker": literal(owner.worker),
        "token": {"$concat": [literal(f"{token}-"), {"$toString": "$_id"}]} if ahead else literal(token),
        "locked_at": "$$NOW",
        "expires_at": {"$add": ["$$NOW", round(lease_seconds * 1000)]},
    }
    lock["ahead"] = True if ahead else {"$cond": [waits, True, "$$REMOVE"]}
    fields: Document = {
        "status": Status.RUNNING.value,
        "started_at": "$$NOW",
        "updated_at": "$$NOW",
        "lock": {"$mergeObjects": [lock]},  # an expression: replaces what was there instead of merging
        "logs": with_entries([f"picked up by worker {owner.worker_pid} on {owner.host}"]),
    }
    if not ahead:
        fields["attempts"] = {"$cond": [waits, number("attempts"), add_one("attempts")]}
    return [{"$set": fields}, {"$unset": "cancel_requested"}]


# -- running → anything -----------------------------------------------------------------------------------------------


def held(job_id: Any, token: str) -> Document:
    return {"_id": job_id, "status": Status.RUNNING.value, "lock.token": token}


def renew(supervisor_id: str, tokens: Sequence[str], lease_seconds: float) -> Move:
    """The leases of these jobs hold for another while, from now on the server's clock."""
    expires = {"$add": ["$$NOW", round(lease_seconds * 1000)]}
    return Move(
        {
            "status": Status.RUNNING.value,
            "lock.supervisor_id": supervisor_id,
            "lock.token": {"$in": list(tokens)},
        },
        [{"$set": {"lock": {"$mergeObjects": ["$lock", {"expires_at": expires}]}}}],
    )


def confirm(job_id: Any, token: str) -> Move:
    """A job that was claimed ahead has started, and takes its time: its attempt counts, for everyone to see."""
    return Move(
        {**held(job_id, token), "lock.ahead": True},
        [
            {"$set": {"attempts": add_one("attempts"), "started_at": "$$NOW", "updated_at": "$$NOW"}},
            {"$unset": "lock.ahead"},
        ],
    )


def finish(
    job_id: Any,
    token: str,
    outcome: Outcome,
    verdict: Verdict,
    *,
    attempt: int,
    ran: tuple[int, int] | None = None,
    details: Mapping[str, Any],
    lines: Sequence[str],
) -> Move:
    """What became of an attempt: the fields of its outcome, the counters, and the last lines of its log.

    `ran` is when it began and ended, in milliseconds on the server's clock: outcomes are written later, together.
    """
    began: Any = "$started_at"
    ended: Any = "$$NOW"
    if ran is not None:
        ended = {"$min": [{"$toDate": ran[1]}, "$$NOW"]}
        began = {"$subtract": [ended, ran[1] - ran[0]]}
    fields: Document = {
        "status": verdict.status.value,
        "updated_at": "$$NOW",
        "started_at": began,
        "finished_at": ended,
        "exit_code": literal(outcome.exit_code),
        "reason": literal(outcome.reason.value if outcome.reason else None),
        "error": literal(outcome.error),
        "attempts": attempt,
        **counters(),
        "logs": with_entries_after_cut(lines) if attempt > 1 else with_entries(lines),
    }
    fields |= {name: literal(value) for name, value in details.items()}
    if outcome.peak_memory_mb is not None:
        fields["peak_memory"] = outcome.peak_memory_mb
    if verdict.counter:
        fields[verdict.counter] = add_one(verdict.counter)
    if verdict.retry_after_seconds is not None:
        fields["scheduled_date"] = {"$add": ["$$NOW", round(verdict.retry_after_seconds * 1000)]}
    if outcome.reason is Reason.MEMORY_EXCEEDED:
        fields["memory_kills"] = add_one("memory_kills")
    if verdict.required_memory is not None:
        fields["required_memory"] = verdict.required_memory
        fields["declared_memory"] = {
            "$ifNull": ["$declared_memory", {"$ifNull": ["$required_memory", DEFAULT_MEMORY_MB]}]
        }
    completion = None
    if ran is not None and attempt == 1 and verdict.status is Status.COMPLETED:
        completion = _completion(outcome, ran, details, lines)
    return Move(held(job_id, token), [*_finished(fields), {"$unset": _REMOVED_WITH_THE_LOCK}], completion)


def _completion(
    outcome: Outcome, ran: tuple[int, int], details: Mapping[str, Any], lines: Sequence[str]
) -> Completion | None:
    """None where it has too much to say."""
    if sum(map(len, lines)) > LONGEST_TOGETHER:
        return None
    began, ended = (datetime.fromtimestamp(at / 1000, UTC) for at in ran)
    stamp = ended.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {
        "status": Status.COMPLETED.value,
        "started_at": began,
        "finished_at": ended,
        "exit_code": outcome.exit_code,
        "reason": None,
        "error": None,
        "attempts": 1,
        **details,
    }
    if outcome.peak_memory_mb is not None:
        fields["peak_memory"] = outcome.peak_memory_mb
    return Completion(fields, [f"[{stamp}] {line}" for line in lines])


def together(moves: Sequence[Move]) -> Move:
    """Moves with completions as one statement: that takes the server half as long as one for each of them."""
    ids = [move.filter["_id"] for move in moves]
    tokens = [move.filter["lock.token"] for move in moves]
    rows = [[move.completion.fields, move.completion.lines] for move in moves if move.completion is not None]
    own = {"$arrayElemAt": [literal(rows), {"$indexOfArray": [literal(ids), "$_id"]}]}
    fields, lines = ({"$arrayElemAt": ["$$own", place]} for place in (0, 1))
    common = {"updated_at": "$$NOW", **counters(), "logs": with_lines(lines)}
    completed = {"$let": {"vars": {"own": own}, "in": {"$mergeObjects": ["$$ROOT", fields, common]}}}
    return Move(
        {"_id": {"$in": ids}, "status": Status.RUNNING.value, "lock.token": {"$in": tokens}},
        [{"$replaceWith": completed}, {"$unset": _REMOVED_WITH_THE_LOCK}],
    )


def finish_bare(job_id: Any, token: str, outcome: Outcome, verdict: Verdict, *, attempt: int) -> Move:
    """The outcome alone, for a document that is too large to take more."""
    fields: Document = {
        "status": verdict.status.value,
        "exit_code": literal(outcome.exit_code),
        "reason": literal(outcome.reason.value if outcome.reason else None),
        "error": literal((outcome.error or "")[:200]),
        "attempts": attempt,
        "finished_at": "$$NOW",
    }
    return Move(held(job_id, token), [{"$set": fields}, {"$unset": _REMOVED_WITH_THE_LOCK}])


def _finished(fields: Document) -> Pipeline:
    """A job that goes back to pending although someone asked to cancel it is cancelled instead."""
    if fields["status"] != Status.PENDING.value:
        return [{"$set": fields}]
    asked = {"$eq": ["$cancel_requested", True]}
    fields["status"] = {"$cond": [asked, Status.CANCELLED.value, Status.PENDING.value]}
    fields["reason"] = {"$cond": [asked, Reason.CANCELLED.value, fields["reason"]]}
    return [{"$set": fields}]


def give_back(job_id: Any, token: str) -> Move:
    """A claimed job that was never started returns. `attempts` never goes down: a claim that was counted stays so."""
    return Move(
        held(job_id, token),
        [
            *_finished(
                {
                    "status": Status.PENDING.value,
                    "reason": "$reason",
                    "attempts": number("attempts"),
                    **counters(),
                    "updated_at": "$$NOW",
                    "logs": with_entries(["handed back before it was started"]),
                }
            ),
            {"$unset": _REMOVED_WITH_THE_LOCK},
        ],
    )


def lose(condition: Document, why: str) -> Move:
    """An attempt that a crash took: back to pending, or failed when that has happened too often.

    What was claimed ahead may not have started: it is no proof against the job, and counts as an attempt only.
    """
    ahead = {"$eq": ["$lock.ahead", True]}
    losses = {"$add": [number("losses"), {"$cond": [ahead, 0, 1]}]}
    attempts = {"$add": [number("attempts"), {"$cond": [ahead, 1, 0]}]}
    too_often = {"$gte": ["$losses", MAX_LOSSES]}
    asked = {"$eq": ["$cancel_requested", True]}
    cases = [{"case": asked, "then": Status.CANCELLED.value}, {"case": too_often, "then": Status.FAILED.value}]
    error = {"$concat": [literal(f"{why} ("), {"$toString": "$losses"}, literal(f" of {MAX_LOSSES} losses)")]}
    return Move(
        condition,
        [
            {"$set": {**counters(), "losses": losses, "attempts": attempts}},
            {
                "$set": {
                    "status": {"$switch": {"branches": cases, "default": Status.PENDING.value}},
                    "reason": {"$cond": [asked, Reason.CANCELLED.value, Reason.LOST.value]},
                    "error": error,
                    "exit_code": literal(None),
                    "updated_at": "$$NOW",
                    "finished_at": "$$NOW",
                    "logs": with_entries([f"attempt lost: {why}"]),
                }
            },
            {"$unset": _REMOVED_WITH_THE_LOCK},
        ],
    )


def lose_bare(condition: Document) -> Move:
    """The same for a document that is too large to take more: failed, and nothing else."""
    fields = {"status": Status.FAILED.value, "reason": Reason.LOST.value}
    return Move(condition, [{"$set": fields}, {"$unset": _REMOVED_WITH_THE_LOCK}])


# -- what can be reclaimed --------------------------------------------------------------------------------------------


def expired() -> Document:
    """Leases that ended. A missing date sorts below every other: only real dates are compared."""
    return {
        "status": Status.RUNNING.value,
        "lock.expires_at": {"$type": "date"},
        "$expr": {"$lt": ["$lock.expires_at", "$$NOW"]},
    }


def abandoned_by_others(older_than_seconds: float = 3600.0) -> Document:
    """Running jobs without a lease (another program's), untouched for an hour."""
    last = {"$ifNull": ["$updated_at", "$started_at", "$created_at", "$$NOW"]}
    age = {"$subtract": ["$$NOW", round(older_than_seconds * 1000)]}
    return {
        "status": Status.RUNNING.value,
        "lock.expires_at": {"$not": {"$type": "date"}},  # whatever else another program calls its lock
        "$expr": {"$and": [{"$eq": [{"$type": last}, "date"]}, {"$lt": [last, age]}]},
    }


def of_worker(supervisor_id: str, worker: str) -> Document:
    return {"status": Status.RUNNING.value, "lock.supervisor_id": supervisor_id, "lock.worker": worker}


def of_supervisors(supervisor_ids: Sequence[str]) -> Document:
    return {"status": Status.RUNNING.value, "lock.supervisor_id": {"$in": list(supervisor_ids)}}


# -- on request -------------------------------------------------------------------------------------------------------


def cancel_pending(job_id: Any) -> Move:
    return Move(
        {"_id": job_id, "status": Status.PENDING.value},
        [
            {
                "$set": {
                    "status": Status.CANCELLED.value,
                    "reason": Reason.CANCELLED.value,
                    "error": "cancelled before it was started",
                    "exit_code": {"$ifNull": ["$exit_code", None]},
                    "attempts": number("attempts"),
                    **counters(),
                    "updated_at": "$$NOW",
                    "finished_at": "$$NOW",
                    "logs": with_entries(["cancelled before it was started"]),
                }
            }
        ],
    )


def request_cancel(job_id: Any) -> Move:
    """Asks the supervisor that runs the job to stop it. A job without a lease is another program's."""
    return Move(
        {"_id": job_id, "status": Status.RUNNING.value, "lock.token": {"$type": "string"}},
        [{"$set": {"cancel_requested": True, "updated_at": "$$NOW", "logs": with_entries(["asked to cancel"])}}],
    )


def retry(job_id: Any) -> Move:
    """A finished job runs again, now, with its failures and losses forgotten; `attempts` goes on."""
    return Move(
        {"_id": job_id, "status": {"$in": [Status.FAILED.value, Status.CANCELLED.value, Status.COMPLETED.value]}},
        [
            {
                "$set": {
                    "status": Status.PENDING.value,
                    "scheduled_date": "$$NOW",
                    "updated_at": "$$NOW",
                    "failures": 0,
                    "losses": 0,
                    "reason": None,
                    "error": None,
                    "logs": with_entries(["retried on request"]),
                }
            },
            {"$unset": ["lock", "cancel_requested", "finished_at", "exit_code"]},
        ],
    )


_BEFORE: dict[Status, list[str | None]] = {
    Status.PENDING: ["pending", "running"],
    Status.RUNNING: ["pending", "running", None],
    Status.COMPLETED: ["running"],
    Status.FAILED: ["running"],
    Status.CANCELLED: ["pending", "running", None],
}
"""From where a job may come to a status; a document without a status is pending."""


def set_status(job_id: Any, token: str | None, status: Status, text: str) -> Move:
    """What a worker of somebody's own reports: conditional on its lock, if it took one.

    Without one, a job that a supervisor holds is left alone: whoever runs it would not know.
    """
    by_supervisor = {"$ne": [{"$ifNull": ["$lock.worker", None]}, {"$ifNull": ["$lock.supervisor_id", None]}]}
    condition: Document = {"_id": job_id, "status": {"$in": _BEFORE[status]}, "$expr": {"$not": [by_supervisor]}}
    if token is not None:
        condition = held(job_id, token)
    fields: Document = {
        "status": status.value,
        "updated_at": "$$NOW",
        **counters(),
        "logs": with_entries_after_cut([text]),
    }
    if status is Status.RUNNING:
        starts = {"$ne": ["$status", Status.RUNNING.value]}
        fields["attempts"] = {"$cond": [starts, add_one("attempts"), number("attempts")]}
        fields["started_at"] = {"$cond": [starts, "$$NOW", "$started_at"]}
        return Move(condition, [{"$set": fields}])
    if status.is_final:
        fields |= {
            "finished_at": "$$NOW",
            "attempts": number("attempts"),
            "exit_code": literal(None),
            "reason": literal(Reason.CANCELLED.value if status is Status.CANCELLED else None),
            "error": literal(None if status is Status.COMPLETED else text),
        }
    if status is Status.FAILED:
        fields["failures"] = add_one("failures")
    return Move(condition, [{"$set": fields}, {"$unset": _REMOVED_WITH_THE_LOCK}])


def adopt() -> Move:
    """Gives pending documents of other programs the values that the order of running needs."""
    return Move(
        {"status": Status.PENDING.value, "priority": None},
        [{"$set": {"priority": 0, "queue": {"$ifNull": ["$queue", "default"]}}}],
    )


def refuse_never_due() -> list[Move]:
    """Fails jobs that no claim would ever find, and so none would refuse.

    What is no date, but sorts behind every date; and what is no number of MB, but compares as larger than any limit.
    """
    kinds = ["timestamp", "regex", "javascript", "javascriptWithScope", "maxKey"]
    pending = {"status": Status.PENDING.value}
    size = "$required_memory"
    broken = {"$or": [{"$ne": [{"$trunc": size}, size]}, {"$gte": [size, 2.0**63]}]}
    only_doubles = {"$cond": [{"$eq": [{"$type": size}, "double"]}, broken, False]}
    odd = {"$or": [{"required_memory": {"$type": ["array", "decimal"]}}, {"$expr": only_doubles}]}
    return [
        Move({**pending, "scheduled_date": {"$type": kinds}}, invalid("scheduled_date: is not a date")),
        Move({**pending, **odd}, invalid("required_memory: must be a valid integer, a whole number of MB")),
    ]


SHARED_UNIQUE_KEYS: Pipeline = [
    {"$match": {"status": {"$in": ["pending", "running"]}, "unique_key": {"$type": "string"}}},
    {"$sort": {"status": -1, "created_at": 1, "_id": 1}},
    {"$group": {"_id": "$unique_key", "ids": {"$push": "$_id"}}},
    {"$match": {"ids.1": {"$exists": True}}},
]
"""Live jobs that have the same unique key: of each key those that run, then the oldest first."""


def invalid(error: str) -> Pipeline:
    """The end of a document that cannot be run, and that nobody claimed."""
    fields: Document = {
        "status": Status.FAILED.value,
        "reason": Reason.INVALID_JOB.value,
        "error": literal(error),
        "exit_code": literal(None),
        "attempts": number("attempts"),
        **counters(),
        "failures": add_one("failures"),
        "updated_at": "$$NOW",
        "finished_at": "$$NOW",
        "logs": with_entries([f"failed: {error}"]),
    }
    return [{"$set": fields}]


def adopt_without_status() -> Move:
    """A document without a status is a pending job."""
    return Move(
        {"status": None, "python_path": {"$exists": True}},
        [{"$set": {"status": Status.PENDING.value, "priority": {"$ifNull": ["$priority", 0]}}}],
    )
