"""One sentence about one job: why it does not run, what it is doing, or why it ended as it did. Pure.

The supervisors' own documents tell what they can take; a supervisor that died a moment ago may still be believed
for as long as it counts as live, so that the sentence is at most half a minute behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from supervisor.cli.render import counted, size, span, when
from supervisor.job import DEFAULT_MEMORY_MB
from supervisor.states import Reason, Status

Document = Mapping[str, Any]
_CLOSED_PHASES = ("draining", "stopping", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What else matters to one job, all seen at about the same time."""

    now: datetime
    """The server's clock."""
    supervisors: Sequence[Document] = ()
    """The documents of the live ones."""
    jobs_before: int = 0
    """Due jobs that come first, counted up to `counted_up_to`."""
    counted_up_to: int = 1000
    key_holder: str | None = None
    """The id of another pending or running job with this job's unique key."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """`why` is a stable word for machines."""

    why: str
    sentence: str


def explain(job: Document, situation: Situation) -> Explanation:
    """Why this job is where it is."""
    status = job.get("status")
    if status == Status.PENDING:
        return _pending(job, situation)
    if status == Status.RUNNING:
        return _running(job, situation)
    if status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
        return _ended(job, situation)
    return Explanation(
        "unknown_status",
        f"Its status is {status!r}, which nobody serves: set it to pending to have the job run.",
    )


def serves(supervisor: Document, queue: str) -> bool:
    """Whether a supervisor takes jobs of this queue; one that names no queues takes all."""
    queues = supervisor.get("queues") or []
    return not queues or queue in queues


def budget_of(supervisor: Document) -> float:
    """Its whole memory budget in MB; infinite where it does not say."""
    return _number(supervisor.get("budget_mb"), float("inf"))


def as_now(supervisors: Sequence[Document], running: Sequence[Document]) -> list[dict[str, Any]]:
    """The supervisors' documents, written every some seconds, with slots and memory as the running jobs say now."""
    return [_as_now(each, [job for job in running if _holder(job) == each.get("_id")]) for each in supervisors]


def _as_now(supervisor: Document, jobs: Sequence[Document]) -> dict[str, Any]:
    reserved = sum(_number(job.get("required_memory"), DEFAULT_MEMORY_MB) for job in jobs)
    counts: dict[str, Any] = {"busy": len(jobs), "reserved_mb": round(reserved)}
    if "idle" in supervisor:  # it has said how many workers it has
        workers, starting = (int(_number(supervisor.get(name), 0)) for name in ("workers", "starting"))
        counts["idle"] = max(0, workers - starting - len(jobs))
    return {**supervisor, **counts}


def _holder(job: Document) -> Any:
    lock = job.get("lock")
    return lock.get("supervisor_id") if isinstance(lock, Mapping) else None


# -- pending ----------------------------------------------------------------------------------------------------------


def _pending(job: Document, situation: Situation) -> Explanation:
    due = _moment(job.get("scheduled_date"))
    if due is not None and due > situation.now:
        return _due_later(job, due, (due - situation.now).total_seconds())
    if not situation.supervisors:
        return Explanation(
            "no_supervisor", "It is due, but no supervisor is running: start one with python -m supervisor."
        )
    queue = str(job.get("queue") or "default")
    serving = [each for each in situation.supervisors if serves(each, queue)]
    if not serving:
        live = len(situation.supervisors)
        none = (
            "the running supervisor does not serve" if live == 1 else f"none of the {live} running supervisors serves"
        )
        return Explanation("queue_not_served", f"It is due, but {none} its queue, {queue!r}.")
    if situation.key_holder:
        return Explanation(
            "unique_key", f"Its unique key is taken by job {situation.key_holder}, which must end first."
        )
    needed = _number(job.get("required_memory"), DEFAULT_MEMORY_MB)
    roomy = [each for each in serving if budget_of(each) >= needed]
    if not roomy:
        largest = max(serving, key=budget_of)
        return Explanation(
            "too_large",
            f"It needs {size(needed)}, more than the whole memory budget of every supervisor of its queue: the "
            f"largest has {size(budget_of(largest))}, on {largest.get('host')}.",
        )
    return _waiting(needed, roomy, situation)


def _due_later(job: Document, due: datetime, seconds: float) -> Explanation:
    at = f"in {span(seconds)}, at {when(due)} UTC"
    failures = int(_number(job.get("failures"), 0))
    if failures and job.get("error"):
        most = int(_number(job.get("max_attempts"), 1))
        sentence = f"Its last attempt failed ({failures} of {most}): {_end(job['error'])} It is tried again {at}."
        return Explanation("retry_later", sentence)
    return Explanation("due_later", f"It is not due yet: it may run {at}.")


def _waiting(needed: float, supervisors: Sequence[Document], situation: Situation) -> Explanation:
    ahead = _ahead(situation)
    open_ones = [each for each in supervisors if not each.get("paused") and each.get("phase") not in _CLOSED_PHASES]
    if not open_ones:
        states = sorted({f"{_closed_because(each)} on {each.get('host')}" for each in supervisors})
        return Explanation("paused", f"It is due, but nothing new is started now: {'; '.join(states)}.")
    with_slot = [each for each in open_ones if _number(each.get("idle"), 0) > 0]
    if not with_slot:
        workers = sum(int(_number(each.get("workers"), 0)) for each in open_ones)
        busy = sum(int(_number(each.get("busy"), 0)) for each in open_ones)
        if busy < workers:
            return Explanation("starting", f"The workers are still starting ({busy} of {workers} are busy){ahead}.")
        slots = (
            "The only worker that could take it is" if workers == 1 else f"All {workers} workers that could take it are"
        )
        return Explanation("no_slot", f"{slots} busy{ahead}.")
    free = {str(each.get("host")): budget_of(each) - _number(each.get("reserved_mb"), 0) for each in with_slot}
    host, most = max(free.items(), key=lambda item: item[1])
    if most < needed:
        return Explanation("memory", f"It waits for memory: {_part(max(0.0, most), needed)} are free on {host}{ahead}.")
    if situation.jobs_before:
        return Explanation("behind_others", f"It is due and has room{ahead}.")
    return Explanation("next", "It is due, it is the next one, and there is room: it starts within moments.")


def _ahead(situation: Situation) -> str:
    count = situation.jobs_before
    if not count:
        return ""
    more = "at least " if count >= situation.counted_up_to else ""
    return f"; {more}{counted(count, 'job')} come{'s' if count == 1 else ''} first"


def _closed_because(supervisor: Document) -> str:
    return str(supervisor.get("paused") or f"the supervisor is {supervisor.get('phase')}")


def _part(some: float, whole: float) -> str:
    """`3 of the 6 GB it needs`: the unit once, where both have the same."""
    a, b = size(some), size(whole)
    return f"{a.split()[0] if a.split()[1] == b.split()[1] else a} of the {b} it needs"


# -- running ----------------------------------------------------------------------------------------------------------


def _running(job: Document, situation: Situation) -> Explanation:
    lock = job.get("lock")
    began = _moment(job.get("started_at")) or _moment(job.get("updated_at"))
    age = f" for {span((situation.now - began).total_seconds())}" if began else ""
    if not isinstance(lock, Mapping):
        return Explanation(
            "running_elsewhere",
            f"Another program runs it{age} and holds no lease: it is taken back one hour after its last update.",
        )
    where = f"on {lock.get('host')}, worker {lock.get('worker_pid')}"
    expires = _moment(lock.get("expires_at"))
    if expires is not None and expires < situation.now:
        ended = span((situation.now - expires).total_seconds())
        taker = "a supervisor takes it back soon" if situation.supervisors else "no supervisor is there to take it back"
        return Explanation(
            "lease_expired",
            f"Whoever ran it ({where}) was not heard of since its lease ended {ended} ago: {taker}.",
        )
    if job.get("cancel_requested"):
        return Explanation("stopping", f"It has been running{age} {where}, and was asked to stop.")
    used = next((_number(each.get("used_mb"), 0) for each in _its_facts(job, situation.supervisors)), None)
    memory = size(_number(job.get("required_memory"), DEFAULT_MEMORY_MB))
    using = f", and uses {size(used)} of its {memory}" if used is not None else f", within {memory}"
    attempt = int(_number(job.get("attempts"), 1))
    timeout = job.get("timeout")
    left = ""
    if isinstance(timeout, int | float) and began:
        left = f"; its timeout is in {span(timeout - (situation.now - began).total_seconds())}"
    return Explanation("running", f"It has been running{age} {where} (attempt {attempt}){using}{left}.")


def _its_facts(job: Document, supervisors: Sequence[Document]) -> list[Document]:
    return [
        fact
        for supervisor in supervisors
        for fact in supervisor.get("jobs") or []
        if isinstance(fact, Mapping) and str(fact.get("job_id")) == str(job.get("_id"))
    ]


# -- ended ------------------------------------------------------------------------------------------------------------


def _ended(job: Document, situation: Situation) -> Explanation:
    status, reason = str(job.get("status")), job.get("reason")
    at = _moment(job.get("finished_at"))
    date = f" at {when(at)} UTC" if at else ""
    taken = ""
    if situation.key_holder:
        taken = f" It cannot be retried now: its unique key is taken by job {situation.key_holder}."
    if status == Status.COMPLETED:
        began, peak = _moment(job.get("started_at")), job.get("peak_memory")
        after = f" after {span((at - began).total_seconds())}" if at and began else ""
        reserved = size(_number(job.get("required_memory"), DEFAULT_MEMORY_MB))
        used = f" and used {size(peak)} of its {reserved}" if isinstance(peak, int | float) else ""
        return Explanation("completed", f"It completed{date}{after}{used}.{taken}")
    if status == Status.CANCELLED:
        error = str(job.get("error") or "cancelled on request")
        return Explanation("cancelled", f"It was cancelled{date}: {_end(error)}{taken}")
    error = job.get("error") or (f"exit code {job['exit_code']}" if job.get("exit_code") else "no reason was recorded")
    return Explanation(str(reason or "failed"), f"It failed{date}: {_end(error)}{_tries(job)}{_advice(job)}{taken}")


def _tries(job: Document) -> str:
    failures, most = int(_number(job.get("failures"), 0)), int(_number(job.get("max_attempts"), 1))
    return f" All {most} attempts that it was allowed failed." if most > 1 and failures >= most else ""


def _advice(job: Document) -> str:
    if job.get("reason") == Reason.MEMORY_EXCEEDED:
        return " Raise required_memory; jobs memory shows what its script uses."
    if job.get("reason") == Reason.LOST:
        return " What lost it were crashes of a worker, a supervisor or a host, not its own exit."
    return ""


def _end(sentence: Any) -> str:
    """The text as the end of a sentence, on one line."""
    text = " ".join(str(sentence).split())
    return text if text.endswith((".", "!", "?")) else text + "."


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _moment(value: Any) -> datetime | None:
    if not isinstance(value, datetime):
        return None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value
