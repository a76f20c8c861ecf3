"""`doctor`: what is wrong with the configuration, MongoDB and the jobs, and what to do about it.

Every check is a finding: OK, WARN (works, but look at it) or FAIL. Where MongoDB cannot be reached the findings about
the configuration are shown all the same. Changes nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from supervisor import installation
from supervisor.cli import render
from supervisor.cli.explain import budget_of, serves
from supervisor.errors import ConfigurationError, StoreUnavailable, SupervisorError
from supervisor.store.schema import UNIQUE_INDEX

if TYPE_CHECKING:
    from supervisor.manager import JobManager
    from supervisor.settings import Settings

Document = Mapping[str, Any]

OLDEST_SERVER = (6, 0)
CLOCK_SKEW_SECONDS = 2.0
STUCK_SECONDS = 3600.0
WASTED_SHARE = 0.5
LEAST_FREE_DISK_MB = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    level: Literal["OK", "WARN", "FAIL"]
    check: str
    message: str
    advice: str = ""


def doctor(options: argparse.Namespace) -> int:
    """Runs all checks. 0 if none failed, 1 otherwise, 2 if the settings are wrong, 3 if MongoDB cannot be reached."""
    report = _Report(as_json=options.json)
    error = _examine(report)
    code = report.end()
    if error is not None:
        raise error
    return code


def _examine(report: _Report) -> SupervisorError | None:
    """Adds every finding; returns the error that ended the examination early."""
    from supervisor.cli.main import connected
    from supervisor.settings import load_settings

    report.add(_check_distribution())
    try:
        settings = load_settings()
    except ConfigurationError as error:
        report.add(Finding("FAIL", "settings", str(error), "correct the variable, or the line in settings.env"))
        return error
    report.add_all(check_settings(settings))
    try:
        with connected() as manager:
            manager.reports.server_now()
            report.add_all(check_server(manager, settings))
            report.add_all(check_jobs(manager))
    except ConfigurationError as error:
        report.add(Finding("FAIL", "MongoDB", str(error), "correct the setting"))
        return error
    except StoreUnavailable as error:
        report.add(Finding("FAIL", "MongoDB", str(error), "start it, or correct SUPERVISOR_MONGO_URI"))
        return error
    return None


class _Report:
    """Shows findings as they come, or all at once as one JSON document."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        self._findings.append(finding)
        if self._as_json:
            return
        style = render.STATUS_STYLES[finding.level] if finding.level != "OK" else ""
        render.line(f"{finding.level:<5} {finding.check}: {render.printable(finding.message)}", style)
        if finding.advice:
            print(f"      → {render.printable(finding.advice)}", flush=True)

    def add_all(self, findings: Iterator[Finding]) -> None:
        for finding in findings:
            self.add(finding)

    def end(self) -> int:
        """Shows what came of it; returns the exit code."""
        failed = sum(finding.level == "FAIL" for finding in self._findings)
        warned = sum(finding.level == "WARN" for finding in self._findings)
        if self._as_json:
            render.print_json({"ok": not failed, "findings": [asdict(finding) for finding in self._findings]})
        else:
            print(f"\n{render.counted(failed, 'failure')}, {render.counted(warned, 'warning')}")
        return 1 if failed else 0


# -- configuration ----------------------------------------------------------------------------------------------------


def _check_distribution() -> Finding:
    found = installation.conflicting_distribution()
    if found is None:
        return Finding("OK", "installation", f"Python {sys.version.split()[0]}, {sys.executable}")
    message = f"the distribution {found} (supervisord) is installed here, too, and overwrites parts of this package"
    return Finding("FAIL", "installation", message, installation.advice())


def check_settings(settings: Settings) -> Iterator[Finding]:
    """What can be told without MongoDB."""
    from supervisor.settings import unknown_settings

    unknown = unknown_settings()
    if unknown:
        advice = "correct or remove them; settings.env.example lists every setting"
        yield Finding("WARN", "settings", f"unknown: {', '.join(unknown)}", advice)
    else:
        yield Finding("OK", "settings", "every name is known")
    yield _check_roots(settings)
    yield _check_python(settings)
    yield _check_data_dir(settings)


def _check_roots(settings: Settings) -> Finding:
    advice = "create it, or correct SUPERVISOR_TASK_ROOTS: the supervisor does not start"
    try:
        missing = [str(root) for root in settings.roots if not os.path.isdir(root)]
    except ConfigurationError as error:
        return Finding("FAIL", "task roots", str(error), advice)
    if missing:
        return Finding("FAIL", "task roots", f"no directory: {', '.join(missing)}", advice)
    return Finding("OK", "task roots", f"scripts must be in {', '.join(map(str, settings.roots))}")


def _check_python(settings: Settings) -> Finding:
    from supervisor.settings import check_interpreter

    try:
        check_interpreter(settings.python)
    except ConfigurationError as error:
        advice = "set SUPERVISOR_PYTHON to the absolute path of an interpreter: the supervisor does not start"
        return Finding("FAIL", "interpreter", str(error), advice)
    return Finding("OK", "interpreter", settings.python)


def _check_data_dir(settings: Settings) -> Finding:
    directory = settings.data_dir.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = "give the user of the supervisor the right to write there, or set SUPERVISOR_DATA_DIR"
        return Finding("FAIL", "data directory", f"{existing} is not a directory that can be written to", advice)
    free_mb = shutil.disk_usage(existing).free // 2**20
    if free_mb < LEAST_FREE_DISK_MB:
        advice = "results of jobs are kept there while MongoDB is away: make room"
        return Finding("WARN", "data directory", f"{directory}: {free_mb} MB are free", advice)
    return Finding("OK", "data directory", f"{directory}, {render.size(free_mb)} free")


# -- MongoDB ----------------------------------------------------------------------------------------------------------


def check_server(manager: JobManager, settings: Settings) -> Iterator[Finding]:
    """The server, its clock and the indexes."""
    from supervisor.settings import masked

    version = manager.reports.server_version()
    where = masked(settings.mongo_uri) or f"the embedded MongoDB in {settings.data_dir}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        yield Finding("FAIL", "MongoDB", f"version {version} at {where}", "at least version 6.0 is needed: upgrade it")
    else:
        yield Finding("OK", "MongoDB", f"version {version} at {where}")
    if manager.reports.is_replica_set():
        yield Finding("OK", "change streams", "new jobs wake the workers at once")
    else:
        message = f"it is no replica set: new jobs are found by polling, every {settings.poll_interval:g} s"
        yield Finding("WARN", "change streams", message, "make it a replica set (one member is enough)")
    yield _check_clock(manager)
    yield _check_indexes(manager)


def _check_indexes(manager: JobManager) -> Finding:
    missing = manager.reports.missing_indexes()
    if not missing:
        return Finding("OK", "indexes", "nothing is missing")
    message = f"missing: {', '.join(missing)}"
    shared = manager.reports.shared_unique_keys() if UNIQUE_INDEX in missing else {}
    if not shared:
        return Finding(
            "FAIL", "indexes", message, "they are made when a supervisor starts or JobManager.create_job is called"
        )
    keys = ", ".join(f"{key!r} ({count})" for key, count in list(shared.items())[:3])
    message += f"; it cannot be made while pending and running jobs share a unique_key: {keys}"
    advice = "cancel all but one of each key; a running supervisor keeps one and fails the others that are pending"
    return Finding("FAIL", "indexes", message, advice)


def _check_clock(manager: JobManager) -> Finding:
    before = datetime.now(UTC)
    server = manager.reports.server_now()
    after = datetime.now(UTC)
    skew = max((before - server).total_seconds(), (server - after).total_seconds(), 0.0)
    if skew <= CLOCK_SKEW_SECONDS:
        return Finding("OK", "clock", f"within {max(skew, 0.001):.3f} s of the server's")
    message = f"this host is {render.span(skew)} {'ahead of' if before > server else 'behind'} the server's clock"
    advice = "let both follow NTP; leases do not depend on it, but --in and scheduled dates of this host do"
    return Finding("WARN", "clock", message, advice)


# -- jobs -------------------------------------------------------------------------------------------------------------


def check_jobs(manager: JobManager) -> Iterator[Finding]:
    """Supervisors, and jobs that will not run or do not end."""
    live = [each for each in manager.supervisors.all() if each["live"]]
    yield from _check_supervisors(live)
    yield _check_stuck(manager.reports.running(), manager.reports.server_now(), bool(live))
    unknown = manager.reports.unknown_statuses()
    if unknown:
        found = ", ".join(f"{status!r} ({count:,})" for status, count in unknown.items())
        yield Finding("WARN", "statuses", f"nobody serves jobs with status {found}", "set their status to pending")
    else:
        yield Finding("OK", "statuses", "every job has a known status")
    yield from _check_queues(manager, live)
    yield _check_sizes(manager, live)
    yield _check_declared(manager)


def _check_supervisors(live: Sequence[Document]) -> Iterator[Finding]:
    if not live:
        yield Finding("WARN", "supervisors", "none is running: no job will run", "start one: python -m supervisor")
        return
    hosts = ", ".join(f"{each.get('host')} (pid {each.get('pid')})" for each in live)
    yield Finding("OK", "supervisors", hosts)
    for each in live:
        for problem in [*([each["paused"]] if each.get("paused") else []), *(each.get("problems") or [])]:
            yield Finding("WARN", "supervisors", f"{each.get('host')}: {problem}", "see its log")


def _check_stuck(running: Sequence[Document], now: datetime, is_live: bool) -> Finding:
    expired = [job for job in running if job.get("expired")]
    foreign = [job for job in running if not isinstance(job.get("lock"), Mapping) and _is_old(job, now)]
    if expired:
        advice = (
            "a supervisor takes them back at its next look; if they stay, read its log"
            if is_live
            else "start a supervisor: it takes them back"
        )
        return Finding("FAIL", "stuck jobs", f"running with an expired lease: {_some(expired)}", advice)
    if foreign:
        message = f"running for over an hour, without a lease: {_some(foreign)}"
        return Finding("WARN", "stuck jobs", message, "another program took them; a supervisor takes them back")
    return Finding("OK", "stuck jobs", f"none of {render.counted(len(running), 'running job')}")


def _is_old(job: Document, now: datetime) -> bool:
    updated = job.get("updated_at")
    return isinstance(updated, datetime) and now - updated > timedelta(seconds=STUCK_SECONDS)


def _check_queues(manager: JobManager, live: Sequence[Document]) -> Iterator[Finding]:
    if not live:
        return
    waiting = {name: state for name, state in manager.reports.queues().items() if state.due}
    unserved = [name for name in waiting if not any(serves(each, name) for each in live)]
    if unserved:
        found = ", ".join(f"{name} ({waiting[name].due:,})" for name in sorted(unserved))
        advice = "add them to SUPERVISOR_QUEUES of a supervisor"
        yield Finding("FAIL", "queues", f"due jobs in queues that no running supervisor serves: {found}", advice)
    else:
        yield Finding("OK", "queues", f"{render.counted(len(waiting), 'queue')} with due jobs, each is served")


def _check_sizes(manager: JobManager, live: Sequence[Document]) -> Finding:
    budgets = [budget_of(each) for each in live if isinstance(each.get("budget_mb"), int | float)]
    if not budgets:
        return Finding("OK", "job sizes", "not checked: no running supervisor has said its memory budget")
    largest = max(budgets)
    found = manager.reports.larger_than(round(largest))
    if found:
        message = f"larger than every memory budget ({render.size(largest)} at most): {_some(found)}"
        advice = "lower their required_memory (see jobs memory), raise SUPERVISOR_MEMORY_BUDGET, or add a larger host"
        return Finding("FAIL", "job sizes", message, advice)
    return Finding("OK", "job sizes", f"every pending job fits into a budget of {render.size(largest)}")


def _check_declared(manager: JobManager) -> Finding:
    wasteful = [each for each in manager.reports.memory_by_script() if each.wasted_mb and each.wasted > WASTED_SHARE]
    if not wasteful:
        return Finding("OK", "declared memory", "no script is known to declare more than twice what it uses")
    worst = wasteful[0]
    message = f"{worst.script} declares {worst.declared} MB and used {worst.max} MB at most in {worst.runs} runs"
    return Finding("WARN", "declared memory", message, f"declare {worst.recommended} MB; see: jobs memory")


def _some(jobs: Sequence[Document], shown: int = 3) -> str:
    ids = ", ".join(str(job["_id"]) for job in jobs[:shown])
    return ids + (f" and {len(jobs) - shown:,} more" if len(jobs) > shown else "")
