"""What one claim costs, by how many jobs are pending; a tenth of them, of the highest priority, are for next week."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from pymongo import MongoClient, WriteConcern

from supervisor.manager import JobManager, new_document
from supervisor.store.client import connect
from supervisor.store.jobs import JobStore
from supervisor.store.transitions import Demand, Owner
from tests.benchmarks.plots import LIMIT, OTHERS, OURS, figure
from tests.benchmarks.results import Promise, Section, Table, percentile
from tests.benchmarks.scale import Scale
from tests.support.mongod import MongoServer

DATABASE = "benchmark"
OWNER = Owner(supervisor_id="benchmark", host="benchmark", worker_pid=1, worker="benchmark")
BATCH = 20_000
AHEAD = 16


def measure(scale: Scale) -> Section:
    sizes = [1_000, 10_000] if scale.quick else [1_000, 10_000, 100_000, 1_000_000]
    claims = scale.of(400, 60)
    single: dict[int, list[float]] = {}
    batch: dict[int, list[float]] = {}
    reads: dict[int, tuple[int, int]] = {}
    with MongoServer() as server:
        with JobManager(server.uri, DATABASE) as manager:
            manager.jobs.ensure_indexes()
        client = connect(server.uri, app="benchmark")
        store = JobStore(client, DATABASE, "jobs", uri=server.uri)
        for size in sizes:
            pending = client[DATABASE]["jobs"].count_documents({"status": "pending"})
            _fill(client, size - pending, first=pending)
            _times(20, lambda: [_claim(store)])  # what was just written is in the cache, the plan is cached
            single[size] = _times(claims, lambda: [_claim(store)])
            batch[size] = _times(claims // 16, lambda: _claim_ahead(store))
            reads[size] = _examined(client, store)
            print(f"  {size:,} pending: {median(single[size]):.2f} ms, {AHEAD} ahead {median(batch[size]):.2f} ms each")
        client.close()
    _plot(single, batch, scale.plots / "claim_cost.png")
    rows = [
        [f"{size:,}", *_row(single[size]), *_row(batch[size]), *map(str, reads[size])] for size in sizes
    ]  # fmt: skip
    first, last = sizes[0], sizes[-1]
    ratio = median(single[last]) / median(single[first])
    return Section(
        title="Claim cost",
        about="Milliseconds for one job, seen by the client, claims one after the other, majority write with journal: "
        f"one by one ({claims} claims), and {AHEAD} at once. 10 % of the pending jobs have the highest priority and "
        "are scheduled for next week.",
        tables=[
            Table(
                [
                    "pending jobs",
                    "one by one, median",
                    "p95",
                    f"{AHEAD} at once, median",
                    "p95",
                    "keys read",
                    "documents read",
                ],
                rows,
            )
        ],
        plots=["claim_cost.png"],
        promises=[
            Promise(f"claim at {last:,} pending, against {first:,}", "within 1.5 x", f"{ratio:.2f} x", ratio <= 1.5)
        ],
    )


def _row(times: list[float]) -> list[str]:
    return [f"{median(times):.2f}", f"{percentile(times, 0.95):.2f}"]


def _fill(client: MongoClient[dict[str, Any]], count: int, *, first: int) -> None:
    """Adds pending jobs of several sizes and priorities."""
    jobs = client[DATABASE].get_collection("jobs", write_concern=WriteConcern(w=1))
    now = datetime.now(UTC)
    template = new_document("benchmark", "/srv/tasks/script.py", python_args=["--day", "2024-01-01"])
    for start in range(0, count, BATCH):
        documents = []
        for number in range(first + start, first + min(start + BATCH, count)):
            later = number % 10 == 0
            documents.append(
                {
                    **template,
                    "priority": 10 if later else number % 3,
                    "scheduled_date": now + timedelta(days=7) if later else now - timedelta(seconds=number % 3600),
                    "created_at": now + timedelta(milliseconds=number),
                    "required_memory": 64 << number % 4,
                }
            )
        jobs.insert_many(documents, ordered=False)


def _times(count: int, claim: Callable[[], list[dict[str, Any]]]) -> list[float]:
    """Milliseconds for each job, of so many claims."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        claimed = len(claim())
        times.append((time.perf_counter() - began) * 1000 / claimed)
    return times


def _claim(store: JobStore) -> dict[str, Any]:
    claimed = store.claim(OWNER, secrets.token_hex(12), Demand(limit_mb=4096), 3600)
    if claimed is None:
        raise RuntimeError("nothing was claimed although jobs are due")
    return claimed


def _claim_ahead(store: JobStore) -> list[dict[str, Any]]:
    together_mb = 512 * AHEAD
    claimed = store.claim_ahead(OWNER, secrets.token_hex(12), Demand(limit_mb=together_mb), 3600, AHEAD)
    if len(claimed) < AHEAD:
        raise RuntimeError("less was claimed than is due")
    return claimed


def _examined(client: MongoClient[dict[str, Any]], store: JobStore) -> tuple[int, int]:
    """Index keys and documents that the server read for one claim, from its profiler."""
    database = client[DATABASE]
    database.command("profile", 2)
    _claim(store)
    database.command("profile", 0)
    entry = next(iter(database["system.profile"].find({"command.findAndModify": "jobs"}).sort("ts", -1).limit(1)))
    return int(entry.get("keysExamined", 0)), int(entry.get("docsExamined", 0))


def _plot(single: dict[int, list[float]], batch: dict[int, list[float]], path: Path) -> None:
    with figure(path, height=3.0) as axis:
        for name, times, colour in (("one by one", single, OURS), (f"{AHEAD} at once", batch, OTHERS)):
            axis.plot(list(times), [median(values) for values in times.values()], marker="o", color=colour, label=name)
        bound = 1.5 * median(next(iter(single.values())))
        axis.axhline(bound, color=LIMIT, linestyle="--", label="1.5 x one by one at 1,000")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("pending jobs", fontsize=8)
        axis.set_ylabel("ms for each job, median", fontsize=8)
        axis.legend(fontsize=7)
