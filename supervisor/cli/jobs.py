"""`jobs list|show|explain|cancel|retry|wait`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from supervisor.cli import render
from supervisor.cli.explain import Situation, as_now, explain
from supervisor.cli.main import complain
from supervisor.cli.render import Column
from supervisor.errors import JobNotFound, StoreUnavailable, SupervisorError, UsageError
from supervisor.job import DEFAULT_MEMORY_MB
from supervisor.states import Status
from supervisor.store.reports import JobFilter

if TYPE_CHECKING:
    from supervisor.manager import JobManager

Document = Mapping[str, Any]

FIRST_LOOK_SECONDS = 0.05
LAST_LOOK_SECONDS = 1.0
MAX_POINTS = 8
"""Of the memory that a job used over time."""


def chosen_jobs(options: argparse.Namespace) -> JobFilter:
    """The filter that the options of `add_filters` describe."""
    return JobFilter(
        statuses=options.status, queue=options.queue, tag=options.tag, reason=options.reason,
        name=options.name, script=options.script, since=options.since, until=options.until,
    )  # fmt: skip


# -- look -------------------------------------------------------------------------------------------------------------


def list_jobs(manager: JobManager, options: argparse.Namespace) -> int:
    """Jobs, newest first."""
    found = manager.reports.newest(chosen_jobs(options), limit=options.limit)
    if options.json:
        for document in found:
            render.print_json(render.plain_job(document))
        return 0
    if not found:
        complain("no job matches", word="note")
        return 0
    columns = [
        Column("ID", keep=True), Column("STATUS", keep=True), Column("NAME"), Column("QUEUE", spare=4),
        Column("CREATED", keep=True, spare=3), Column("TRIES", "right", keep=True, spare=5),
        Column("TOOK", "right", keep=True, spare=2), Column("MEMORY", "right", keep=True, spare=1), Column("OUTCOME"),
    ]  # fmt: skip
    render.table(columns, [_row(document) for document in found])
    if len(found) == options.limit and render.on_terminal():
        complain(f"the newest {options.limit} are shown; --limit shows more", word="note")
    return 0


def _row(job: Document) -> list[str]:
    created = job.get("created_at")
    peak, needed = job.get("peak_memory"), job.get("required_memory", DEFAULT_MEMORY_MB)
    return [
        str(job.get("_id")),
        str(job.get("status", "-")),
        str(job.get("request_name", "-")),
        str(job.get("queue") or "default"),
        render.when(created),
        str(job.get("attempts", 0)),
        took(job),
        f"{peak}/{needed} MB" if peak is not None else f"{needed} MB",
        str(job.get("error") or job.get("reason") or ""),
    ]


def took(job: Document) -> str:
    """How long the last attempt ran."""
    began, ended = job.get("started_at"), job.get("finished_at")
    if not (isinstance(began, datetime) and isinstance(ended, datetime)) or ended < began:
        return "-"
    return render.span((ended - began).total_seconds())


def show(manager: JobManager, options: argparse.Namespace) -> int:
    """Everything about one job on one page."""
    job = manager.get_job(options.id)
    if options.json:
        render.print_json(render.plain_job(job))
        return 0
    reason = explain(job, situation(manager, job))
    render.line(f"{render.printable(job.get('request_name', '-'))}  {job['_id']}", "bold")
    status = str(job.get("status"))
    render.line(render.printable(status), render.STATUS_STYLES.get(status, ""))
    print(render.printable(reason.sentence))
    print()
    for label, value in _details(job):
        print(f"{label:<18}{render.printable(value)}")
    print()
    for entry in _listed(job.get("logs")):
        print(render.printable(entry, keep_lines=True).rstrip("\n"))
    return 0


_SHOWN_APART = {
    "_id", "request_name", "status", "logs", "env", "lock", "python_path", "python_args", "memory_samples",
}  # fmt: skip


def _details(job: Document) -> list[tuple[str, str]]:
    shown = [("command", " ".join([str(job.get("python_path", "-")), *map(repr, _listed(job.get("python_args")))]))]
    for name, value in job.items():
        if name in _SHOWN_APART or value is None or value == []:
            continue
        if isinstance(value, datetime):
            shown.append((name, f"{render.when(value)} UTC"))
        elif name in ("required_memory", "declared_memory", "peak_memory", "max_memory"):
            shown.append((name, f"{value} MB"))
        elif name in ("timeout", "retry_delay"):
            shown.append((name, f"{value} s"))
        elif isinstance(value, list):
            shown.append((name, ", ".join(map(str, value))))
        else:
            shown.append((name, str(value)))
    for label, text in zip(("memory_samples", *[""] * MAX_POINTS), growth(job.get("memory_samples")), strict=False):
        shown.append((label, text))
    if isinstance(job.get("env"), Mapping) and job["env"]:  # names only: values may be secrets
        shown.append(("env", ", ".join(map(str, job["env"])) + "  (values: --json)"))
    lock = job.get("lock")
    if isinstance(lock, Mapping):
        expires = lock.get("expires_at")
        shown.append(
            (
                "lock",
                f"worker {lock.get('worker_pid')} on {lock.get('host')} until {render.when(expires)} UTC",
            )
        )
    return shown


def growth(samples: Any, room: int = 60) -> list[str]:
    """How a job's memory changed over time, in lines of `room` characters: some samples, the highest one among them."""
    known = [
        (float(each[0]), float(each[1]))
        for each in _listed(samples)
        if isinstance(each, list) and len(each) == 2 and all(isinstance(value, int | float) for value in each)
    ]
    known = [(seconds, megabytes) for seconds, megabytes in known if math.isfinite(seconds + megabytes)]
    if not known:
        return []
    steps = MAX_POINTS - 2
    chosen = {round(step * (len(known) - 1) / steps) for step in range(steps + 1)}
    chosen.add(max(range(len(known)), key=lambda at: known[at][1]))
    lines = [""]
    for at in sorted(chosen):
        point = f"{render.span(known[at][0])} {known[at][1]:.0f} MB"
        arrow = " → " if lines[-1] else ""
        if len(lines[-1]) + len(arrow) + len(point) > room:
            lines.append(f"→ {point}")
        else:
            lines[-1] += arrow + point
    return lines


def _listed(value: Any) -> list[Any]:
    """Another program may have written anything."""
    return value if isinstance(value, list) else []


def explain_job(manager: JobManager, options: argparse.Namespace) -> int:
    """One sentence about one job."""
    job = manager.get_job(options.id)
    explanation = explain(job, situation(manager, job))
    if options.json:
        status = job.get("status")
        answer = {
            "id": job["_id"],
            "status": status,
            "why": explanation.why,
            "sentence": explanation.sentence,
        }
        render.print_json(answer)
    else:
        print(render.printable(explanation.sentence))
    return 0


def situation(manager: JobManager, job: Document) -> Situation:
    """What else matters to this job now."""
    live = [each for each in manager.supervisors.all() if each["live"]]
    supervisors = as_now(live, manager.reports.running() if live else [])
    now = manager.reports.server_now()
    before = 0
    if job.get("status") == Status.PENDING and supervisors:
        served: set[str] = set()
        for each in supervisors:
            if not each.get("queues"):
                served = set()
                break
            served |= set(each["queues"])
        before = manager.reports.pending_before(dict(job), only=sorted(served))
    holder = manager.jobs.holder_of(job["unique_key"]) if isinstance(job.get("unique_key"), str) else None
    other = str(holder["_id"]) if holder and holder["_id"] != job["_id"] else None
    return Situation(now=now, supervisors=supervisors, jobs_before=before, key_holder=other)


# -- change -----------------------------------------------------------------------------------------------------------


def cancel(manager: JobManager, options: argparse.Namespace) -> int:
    """Cancels each job; 1 if one of them could not be."""
    running: list[str] = []

    def one(job_id: str) -> None:
        status = manager.cancel_job(job_id)
        if status is Status.RUNNING:
            running.append(job_id)
        if options.json:
            render.print_json({"id": job_id, "status": status, "cancel_requested": status is Status.RUNNING})
        else:
            print(f"{job_id} {'asked to stop' if status is Status.RUNNING else 'cancelled'}", flush=True)

    succeeded = _each(options.ids, one, options.json)
    if options.wait and running:
        ended = wait_until_ended(manager, manager.reports.keys(running), None, _say_end(options.json))
        succeeded = succeeded and all(job.get("status") == Status.CANCELLED for job in ended.values())
    return 0 if succeeded else 1


def retry(manager: JobManager, options: argparse.Namespace) -> int:
    """Lets finished jobs run again; 1 if one of them cannot."""
    ids: Sequence[Any] = options.ids
    if options.all == bool(ids):
        raise UsageError("name the jobs to retry, or choose them with --all and filters")
    if options.all:
        options.status = options.status or [Status.FAILED.value]
        for status in options.status:
            if not Status(status).is_final:
                raise UsageError(f"--status: a {status} job cannot be retried, only a finished one")
        ids = list(manager.reports.ids(chosen_jobs(options)))
        if ids and not options.yes:
            _confirm(f"Retry {render.counted(len(ids), 'job')}?")

    def one(job_id: Any) -> None:
        manager.retry_job(job_id)
        if options.json:
            render.print_json({"id": job_id, "status": Status.PENDING})
        elif not options.all:
            print(f"{job_id} pending")

    with render.progress("retrying", len(ids), "jobs") as advance:
        succeeded = _each(ids, one, options.json, advance)
    if options.all and not options.json:
        print(f"{render.counted(len(ids), 'job')} chosen" + ("" if succeeded else ", not all could be retried"))
    return 0 if succeeded else 1


def _each(
    ids: Sequence[Any], change: Callable[[Any], None], as_json: bool, advance: render.Advance = lambda amount: None
) -> bool:
    """Applies a change to each job; one that refuses is named on stderr and does not stop the others."""
    succeeded = True
    for job_id in ids:
        try:
            change(job_id)
        except StoreUnavailable:
            raise
        except SupervisorError as error:
            if as_json:
                render.print_json({"id": job_id, "error": str(error)})
            complain(str(error))
            succeeded = False
        advance(1)
    return succeeded


def _confirm(question: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("--all asks first: add --yes where nobody can answer")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise SupervisorError("nothing was changed")


# -- wait -------------------------------------------------------------------------------------------------------------


def wait(manager: JobManager, options: argparse.Namespace) -> int:
    """Waits for jobs; 0 only if all of them completed."""
    keys = manager.reports.keys(options.ids)
    for job_id in options.ids:
        if job_id not in keys:
            raise JobNotFound(f"there is no job {job_id}")
    ended = wait_until_ended(manager, keys, options.timeout, _say_end(options.json))
    waiting = [job_id for job_id in keys if job_id not in ended]
    if waiting:
        late = f"did not end within {render.span(options.timeout)}"
        for job_id in waiting if options.json else []:
            render.print_json({"id": job_id, "error": late})
        complain(f"{render.counted(len(waiting), 'job')} {late}")
        return 1
    return 0 if all(job.get("status") == Status.COMPLETED for job in ended.values()) else 1


def wait_until_ended(
    manager: JobManager,
    keys: Mapping[str, Any],
    timeout_seconds: float | None,
    on_end: Callable[[str, Document], None] = lambda job_id, job: None,
) -> dict[str, Document]:
    """Waits until the jobs have ended, or the time is over; returns those that have, and calls `on_end` with each.

    One cheap query at a time, less and less often while nothing ends. A removed job counts as ended.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    ended: dict[str, Document] = {}
    pause = FIRST_LOOK_SECONDS
    while True:
        left = {job_id: key for job_id, key in keys.items() if job_id not in ended}
        found = manager.reports.states(list(left.values()))
        for job_id, key in left.items():
            job = found.get(key, {"_id": key, "status": "removed"})
            if job.get("status") not in (Status.PENDING, Status.RUNNING):
                ended[job_id] = job
                on_end(job_id, job)
                pause = FIRST_LOOK_SECONDS
        remaining = float("inf") if deadline is None else deadline - time.monotonic()
        if len(ended) == len(keys) or remaining <= 0:
            return ended
        time.sleep(min(pause, remaining))
        pause = min(LAST_LOOK_SECONDS, pause * 1.5)


def _say_end(as_json: bool) -> Callable[[str, Document], None]:
    def say(job_id: str, job: Document) -> None:
        if as_json:
            render.print_json(render.plain_job(job))
        else:
            error = f": {render.printable(job['error'])}" if job.get("error") else ""
            print(f"{job_id} {job.get('status')}{error}", flush=True)

    return say
