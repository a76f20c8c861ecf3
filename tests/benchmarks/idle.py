"""What an idle pool of four workers costs: CPU time, memory, and the database's time."""

from __future__ import annotations

import time
from typing import Any

from pymongo import MongoClient

from tests.benchmarks.celery_side import celery_redis_side
from tests.benchmarks.mongo_sides import MongoSide, baseline_side, operations_of, supervisor_side
from tests.benchmarks.resources import total_cpu_seconds, total_pss_mb
from tests.benchmarks.results import Promise, Section, Table
from tests.benchmarks.rq_side import rq_side
from tests.benchmarks.scale import Scale
from tests.benchmarks.scripts import write_scripts
from tests.benchmarks.sides import Side, StartSide
from tests.support.mongod import MongoServer

WORKERS = 4
SETTLE_SECONDS = 5.0
SUPERVISOR = "supervisor"
CONTESTANTS: dict[str, StartSide] = {
    SUPERVISOR: supervisor_side(),
    "supervisor, numpy and pandas preloaded": supervisor_side(preload="numpy,pandas"),
    "polling worker": baseline_side(),
    "RQ": rq_side(),
    "Celery on Redis": celery_redis_side(),
}


def measure(scale: Scale) -> Section:
    seconds = scale.of(30, 3)
    background = _background(seconds)
    rows = []
    promises: list[Promise] = []
    for name, start in CONTESTANTS.items():
        directory = scale.fresh("idle")
        scripts = write_scripts(directory)
        with start(directory, WORKERS) as side:
            side.run(scripts.no_op, 4 * WORKERS)
            time.sleep(SETTLE_SECONDS)  # what it does when it becomes idle is over
            cpu, database_cpu, operations, pids = _observe(side, seconds)
            if isinstance(side, MongoSide):
                operations = max(0.0, operations - background)
            memory = total_pss_mb(pids)
        rows.append(
            [name, f"{cpu:.2f} %", f"{database_cpu:.2f} %", f"{operations:.1f}", str(len(pids)), f"{memory:.0f} MB"]
        )
        print("  " + ", ".join(rows[-1]))
        if name == SUPERVISOR:
            promises = [
                Promise("CPU of the idle supervisor, 4 workers", "below 1 % of one core", f"{cpu:.2f} %", cpu < 1),
                Promise("its MongoDB operations a second", "below 5", f"{operations:.1f}", operations < 5),
            ]
    columns = [
        "idle, 4 workers",
        "CPU, % of one core",
        "CPU of database or broker",
        "its operations/s",
        "processes",
        "PSS",
    ]
    return Section(
        title="Idle",
        about=f"All processes of the pool over {seconds} s with an empty queue, after some jobs. Operations: every "
        f"command that the server counts, less the {background:.1f}/s that MongoDB counts without a pool. Memory: "
        "proportional set size, summed; what is preloaded is in the supervisor's number once.",
        tables=[Table(columns, rows)],
        promises=promises,
    )


def _observe(side: Side, seconds: float) -> tuple[float, float, float, list[int]]:
    pids, database = side.pids(), side.database_pids()
    cpu, database_cpu, operations = total_cpu_seconds(pids), total_cpu_seconds(database), side.operations()
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return (
        (total_cpu_seconds(pids) - cpu) / took * 100,
        (total_cpu_seconds(database) - database_cpu) / took * 100,
        (side.operations() - operations - 1) / took,  # less our own question
        pids,
    )


def _background(seconds: float) -> float:
    """Operations per second of a MongoDB that only this process is connected to, as it is while a side is measured."""
    with MongoServer() as server, MongoClient[dict[str, Any]](server.uri) as client:
        time.sleep(SETTLE_SECONDS)
        before = operations_of(client)
        time.sleep(seconds)
        return (operations_of(client) - before - 1) / seconds
