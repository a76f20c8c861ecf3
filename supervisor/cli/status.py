"""`status`: supervisors, workers, queues, memory and running jobs, at a glance.

Read from MongoDB, where every supervisor reports itself: one that was not heard of for half a minute is shown as
gone, with the time when it was last seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from supervisor.cli import render
from supervisor.cli.explain import as_now
from supervisor.cli.render import Column

if TYPE_CHECKING:
    from supervisor.manager import JobManager
    from supervisor.store.reports import QueueState

Document = Mapping[str, Any]

GONE_SHOWN_SECONDS = 86_400
SHOWN_RUNNING = 50


def status(manager: JobManager, options: argparse.Namespace) -> int:
    """Shows everything that is going on."""
    running, by_status, queues = manager.reports.running(), manager.reports.jobs_by_status(), manager.reports.queues()
    supervisors = as_now(manager.supervisors.all(), running)
    used = used_by_job(supervisors)
    if options.json:
        render.print_json(
            {
                "supervisors": [_plain_supervisor(each) for each in supervisors],
                "jobs": by_status,
                "queues": {name: asdict(state) for name, state in sorted(queues.items())},
                "running": [{**render.plain_job(job), "used_memory": used.get(str(job["_id"]))} for job in running],
            }
        )
        return 0
    _show_supervisors(supervisors)
    print()
    print("Jobs      " + "   ".join(f"{count:,} {name}" for name, count in by_status.items()))
    _show_queues(queues)
    _show_running(running, used)
    return 0


def used_by_job(supervisors: Sequence[Document]) -> dict[str, float]:
    """MB that each running job uses, as its live supervisor last said."""
    return {
        str(fact.get("job_id")): fact["used_mb"]
        for each in supervisors
        if each.get("live")
        for fact in each.get("jobs") or []
        if isinstance(fact, Mapping) and isinstance(fact.get("used_mb"), int | float)
    }


def _plain_supervisor(supervisor: Document) -> dict[str, Any]:
    kept = {name: value for name, value in supervisor.items() if name not in ("_id", "jobs")}
    known = [job for job in supervisor.get("jobs") or [] if isinstance(job, Mapping)]
    jobs = [{k: v for k, v in job.items() if k != "token"} for job in known]
    return {"id": supervisor["_id"], **kept, "jobs": jobs}


def _show_supervisors(supervisors: Sequence[Document]) -> None:
    live = [each for each in supervisors if each.get("live")]
    gone = [each for each in supervisors if not each.get("live") and _age(each) < GONE_SHOWN_SECONDS]
    if not live:
        render.line("No supervisor is running. Start one with: python -m supervisor", "bold yellow")
    columns = [
        Column("HOST"), Column("PID", "right", keep=True), Column("VERSION", spare=4), Column("PHASE", keep=True),
        Column("UP", "right", keep=True, spare=2), Column("SEEN", "right", keep=True, spare=3),
        Column("WORKERS", keep=True), Column("QUEUES", spare=1), Column("MEMORY", keep=True, spare=5),
    ]  # fmt: skip
    if supervisors and (live or gone):
        render.table(columns, [_supervisor_row(each) for each in [*live, *gone]])
    for each in live:
        for problem in [*([each["paused"]] if each.get("paused") else []), *(each.get("problems") or [])]:
            render.line(f"{each.get('host')}: {render.printable(problem)}", "yellow")
    for each in live:
        if isinstance(each.get("budget_mb"), int | float):
            print(_budget_line(each))


def _supervisor_row(each: Document) -> list[Any]:
    idle, busy, starting = (each.get(name, 0) for name in ("idle", "busy", "starting"))
    workers = f"{each.get('workers', '?')}: {busy} busy, {idle} idle" + (f", {starting} starting" if starting else "")
    started, seen, age = each.get("started_at"), each.get("seen_at"), _age(each)
    up = (seen - started).total_seconds() + age if isinstance(started, datetime) and isinstance(seen, datetime) else 0.0
    return [
        each.get("host", "-"),
        each.get("pid", "-"),
        each.get("version", "-"),
        each.get("phase", "starting") if each.get("live") else "gone",
        render.span(up) if each.get("live") else "-",
        f"{render.span(age)} ago",
        workers if each.get("live") else "-",
        ", ".join(each.get("queues") or []) or "all",
        _budget_words(each) if each.get("live") else "-",
    ]


def _age(supervisor: Document) -> float:
    age = supervisor.get("age_seconds")
    return max(0.0, float(age)) if isinstance(age, int | float) else float("inf")


def _budget_words(each: Document) -> str:
    budget, reserved = each.get("budget_mb"), each.get("reserved_mb")
    if not isinstance(budget, int | float):
        return "-"
    return f"{render.size(reserved or 0)} of {render.size(budget)} reserved"


def _budget_line(each: Document) -> str:
    budget, reserved, used = (float(each.get(name) or 0) for name in ("budget_mb", "reserved_mb", "used_mb"))
    bar = render.bar([(used, "#"), (reserved, "=")], budget)
    words = f"# used {render.size(used)}  = reserved {render.size(reserved)}  of {render.size(budget)}"
    return f"Memory    [{bar}]  {words}  {each.get('host')}"


def _show_queues(queues: Mapping[str, QueueState]) -> None:
    if not queues:
        return
    print()
    columns = [
        Column("QUEUE", keep=True),
        Column("DUE", "right", keep=True),
        Column("OLDEST", "right", keep=True),
    ]
    rows = [
        [name, f"{state.due:,}", f"{render.span(state.oldest_age_seconds)}" if state.due else "-"]
        for name, state in sorted(queues.items())
    ]
    render.table(columns, rows)


def _show_running(running: Sequence[Document], used: Mapping[str, float]) -> None:
    if not running:
        return
    print()
    columns = [
        Column("RUNNING", keep=True), Column("NAME"), Column("HOST", spare=3), Column("WORKER", "right", spare=4),
        Column("FOR", "right", keep=True), Column("MEMORY", "right", keep=True),
        Column("TRY", "right", keep=True, spare=5), Column("NOTE"),
    ]  # fmt: skip
    render.table(columns, [_running_row(job, used) for job in running[:SHOWN_RUNNING]])
    if len(running) > SHOWN_RUNNING:
        print(f"… and {len(running) - SHOWN_RUNNING:,} more: jobs list --status running")


def _running_row(job: Document, used: Mapping[str, float]) -> list[Any]:
    lock = job["lock"] if isinstance(job.get("lock"), Mapping) else {}
    now_used = used.get(str(job["_id"]))
    needed = job.get("required_memory", "?")
    seconds = job.get("running_seconds")
    note = "lease expired" if job.get("expired") else "asked to stop" if job.get("cancel_requested") else ""
    return [
        job["_id"],
        job.get("request_name", "-"),
        lock.get("host", "another program"),
        lock.get("worker_pid", "-"),
        render.span(seconds) if isinstance(seconds, int | float) else "-",
        f"{now_used if now_used is not None else '-'} / {needed} MB",
        job.get("attempts", "-"),
        note,
    ]
