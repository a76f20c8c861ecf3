"""Where the time of a no-op job goes: CPU milliseconds per job in each kind of process. Not part of the report.

    python -m tests.benchmarks.breakdown [JOBS] [WORKERS] [PRELOAD]

From /proc before and after a run of many jobs, the children that a process has waited for included: a runner's
children are the job processes.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from pymongo import MongoClient

from supervisor import JobManager
from tests.benchmarks.mongo_sides import DATABASE, Document, MongoSide
from tests.benchmarks.resources import CpuTime, cpu_time
from tests.benchmarks.scripts import write_scripts
from tests.support.mongod import MongoServer
from tests.support.running import RunningSupervisor, running_supervisor


def roles_of(supervisor: RunningSupervisor, mongod_pid: int) -> dict[int, str]:
    roles = {
        mongod_pid: "mongod",
        supervisor.pid: "supervisor",
        supervisor.keeper(): "keeper",
        supervisor.warm_interpreter(): "warm interpreter",
    }
    roles |= dict.fromkeys(supervisor.workers(), "worker") | dict.fromkeys(supervisor.runners(), "runner")
    return roles


def switches(pid: int) -> int:
    """Context switches of all threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total


def main(jobs: int = 1000, workers: int = 2, *, preload: str = "") -> None:
    with (
        tempfile.TemporaryDirectory() as scratch,
        MongoServer() as server,
        MongoClient[Document](server.uri) as client,
        JobManager(server.uri, DATABASE) as manager,
    ):
        directory = Path(scratch)
        scripts = write_scripts(directory)
        script = scripts.pandas if preload else scripts.no_op
        manager.jobs.ensure_indexes()
        with running_supervisor(
            directory, server.uri, DATABASE, workers=workers, preload=preload, memory_budget=16384
        ) as supervisor:
            side = MongoSide("supervisor", server, client, [supervisor.pid])
            side.run(script, 100)
            roles = roles_of(supervisor, server.pid)
            before = {pid: cpu_time(pid) for pid in roles}
            switched = {pid: switches(pid) for pid in roles}
            seconds = side.run(script, jobs)
            spent = {pid: cpu_time(pid) - before[pid] for pid in roles}
            switched = {pid: switches(pid) - switched[pid] for pid in roles}
    print(f"{jobs} jobs, {workers} workers: {jobs / seconds:.0f} jobs/s")
    _print(roles, spent, switched, jobs)


def _print(roles: dict[int, str], spent: dict[int, CpuTime], switched: dict[int, int], jobs: int) -> None:
    rows: dict[str, tuple[float, int]] = {}
    for pid, role in roles.items():
        own, count = rows.get(role, (0.0, 0))
        rows[role] = (own + spent[pid].own, count + switched[pid])
    rows["job process"] = (sum(spent[pid].children for pid, role in roles.items() if role == "runner"), 0)
    print(f"{'per job':18}{'CPU ms':>8}{'switches':>10}")
    for role, (own, count) in sorted(rows.items(), key=lambda row: -row[1][0]):
        print(f"{role:18}{own / jobs * 1000:8.3f}{count / jobs:10.1f}")
    total = sum(own for own, _ in rows.values())
    print(f"{'sum':18}{total / jobs * 1000:8.3f}   2 cores fully used: {2 * jobs / total:.0f} jobs/s")


if __name__ == "__main__":
    jobs_and_workers = [int(text) for text in sys.argv[1:3]]
    main(*jobs_and_workers, preload="".join(sys.argv[3:4]))
