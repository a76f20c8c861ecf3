"""How fast a job that exceeds its memory is stopped and gone, whatever its shape; and that no other is.

The delay is measured from outside of the supervisor: the job writes the time after every 256 KB it takes, so the first
time above the limit is the crossing, and the last one is when the kill stopped it. A pidfd says when it is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.manager import JobManager
from supervisor.memory.usage import tree_usage
from supervisor.processes import ProcessRef, process_stat, processes_with_environment
from tests.benchmarks import hogs
from tests.benchmarks.plots import LIMIT, OURS, figure
from tests.benchmarks.resources import total_cpu_seconds
from tests.benchmarks.results import Promise, Section, Table, percentile
from tests.benchmarks.scale import Scale
from tests.support.mongod import MongoServer
from tests.support.running import Jobs, RunningSupervisor, running_supervisor
from tests.support.waiting import wait_until

DATABASE = "benchmark"
LIMIT_MB = 256
STEADY_LIMIT_MB = 64


@dataclass(frozen=True, slots=True)
class Held:
    """What a job holds, and its limit."""

    mb: int
    limit_mb: int

    def __str__(self) -> str:
        return f"{self.mb} of {self.limit_mb} MB held"


FAR, NEAR = Held(64, 512), Held(48, 64)
SAMPLE_SECONDS = 0.005
SPARE_MB = 8
"""A child forked ahead of time for the next job is charged less than this."""


def measure(scale: Scale) -> Section:
    timelines = _all_shapes(scale)
    delays = {watched: _delays(scale, watched) for watched in ((1, 4) if scale.quick else (1, 16, 64))}
    jobs, killed = _steady_jobs(scale)
    _plot(timelines, scale.plots / "memory_kill.png")
    most = max(delays)
    sent = max(percentile(of.sent_ms, 0.99) for of in delays.values())
    gone = max(percentile(of.gone_ms, 0.99) for of in delays.values())
    return Section(
        title="Memory",
        about=f"Jobs that grow beyond their `required_memory` of {LIMIT_MB} MB, measured from outside of the "
        f"supervisor. Delays are of a single process at full speed, with {NEAR} by each "
        "other job; CPU is that of all processes that watch, in % of one core, while nothing grows.",
        tables=[_delay_table(delays), _shape_table(timelines), _steady_table(jobs, killed)],
        plots=["memory_kill.png"],
        promises=[
            Promise("kill sent after the crossing, p99, ms", "within 10", f"{sent:.1f}", sent <= 10),
            Promise("256 MB gone after the crossing, p99, ms", "within 100", f"{gone:.0f}", gone <= 100),
            *(
                Promise(f"CPU of watching {most} jobs, {held}", "less than 5 % of one core", f"{cpu:.1f} %", cpu < 5)
                for held, cpu in delays[most].cpu.items()
            ),
            Promise(f"{jobs} jobs at 95 % of their memory: killed", "0", str(killed), killed == 0),
            Promise(
                "hogs of every shape are killed, nothing is left", "all",
                f"{sum(one.clean for one in timelines)} of {len(timelines)}", all(one.clean for one in timelines),
            ),
        ],
    )  # fmt: skip


@contextlib.contextmanager
def _supervised(scale: Scale, workers: int) -> Iterator[tuple[RunningSupervisor, Jobs, Path]]:
    directory = scale.fresh("memory")
    script = Path(shutil.copy(hogs.__file__, directory / "hogs.py"))
    with MongoServer() as server, JobManager(server.uri, DATABASE) as manager:
        manager.jobs.ensure_indexes()
        settings: dict[str, Any] = {"workers": workers, "memory_budget": LIMIT_MB + workers * FAR.limit_mb}
        with running_supervisor(directory, server.uri, DATABASE, **settings) as supervisor:
            supervisor.wait_idle(workers, timeout=120)
            yield supervisor, Jobs(directory, manager), script


# -- how fast ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delays:
    """Milliseconds from the crossing; megabytes above the limit; GB/s; % of a core by how much of what is held."""

    sent_ms: list[float] = field(default_factory=list)
    gone_ms: list[float] = field(default_factory=list)
    overshoot_mb: list[float] = field(default_factory=list)
    rate_gb: list[float] = field(default_factory=list)
    cpu: dict[Held, float] = field(default_factory=dict)


def _delays(scale: Scale, watched: int) -> Delays:
    found = Delays()
    with _supervised(scale, watched) as (supervisor, jobs, script):
        with _holding(jobs, script, watched - 1, NEAR):
            for number in range(scale.of(200, 5)):
                _one_hog(jobs, script, jobs.directory / f"record-{number}", found)
        for held in (FAR, NEAR):
            with _holding(jobs, script, watched, held):
                found.cpu[held] = _watching_cpu(supervisor, scale.of(20, 3))
    print(f"  {watched} watched: {_delay_row(watched, found)}")
    return found


@contextlib.contextmanager
def _holding(jobs: Jobs, script: Path, count: int, held: Held) -> Iterator[None]:
    """So many jobs that have taken their memory and stay."""
    ids = [jobs.submit(script, "hold", held.mb, required_memory=held.limit_mb) for _ in range(count)]
    for job_id in ids:
        jobs.wait(job_id, "running", timeout=120)
    yield
    for job_id in ids:
        jobs.manager.cancel_job(job_id)
    for job_id in ids:
        jobs.wait(job_id, "cancelled", timeout=120)


def _one_hog(jobs: Jobs, script: Path, path: Path, found: Delays) -> None:
    path.write_bytes(bytes(hogs.RECORD_BYTES))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), hogs.RECORD_BYTES) as record:
        job_id = jobs.submit(script, "timed", path, LIMIT_MB, required_memory=LIMIT_MB)
        wait_until(lambda: hogs.record_of(record[:])[0], what="the job to begin", pause=0.005)
        pid = hogs.record_of(record[:])[0]
        process = process_stat(pid)
        assert process is not None
        own = sum(usage.charged for usage in tree_usage(process.parent, pids=[pid]).values())
        pidfd = os.pidfd_open(pid)
        try:
            struct.pack_into("q", record, hogs.GO * 8, 1)
            if not select.select([pidfd], [], [], 30)[0]:
                raise TimeoutError("nobody stopped a job above its limit")
            gone = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        finally:
            os.close(pidfd)
        times = hogs.record_of(record[:])[1]
    document = jobs.wait(job_id)
    if document.get("reason") != "memory_exceeded":
        raise RuntimeError(f"it was not ended for its memory: {document}")
    taken = own + len(times) * hogs.CHUNK
    if taken < (LIMIT_MB - 1) * hogs.MB:  # 1 MB: what the interpreter itself may take meanwhile
        raise RuntimeError(f"killed below its limit, at {taken} bytes: {document['error']}")
    crossing = times[min((LIMIT_MB * hogs.MB - own) // hogs.CHUNK, len(times) - 1)]
    chunk_ms = (times[-1] - times[0]) / (len(times) - 1) / 1e6
    found.sent_ms.append((times[-1] - crossing) / 1e6 + chunk_ms)  # it was stopped within the next chunk
    found.gone_ms.append((gone - crossing) / 1e6)
    found.overshoot_mb.append((own + (len(times) + 1) * hogs.CHUNK) / hogs.MB - LIMIT_MB)
    found.rate_gb.append(hogs.CHUNK / chunk_ms / 1e6)
    path.unlink()


def _watching_cpu(supervisor: RunningSupervisor, seconds: float) -> float:
    """Of all runners and the lookout: they watch the jobs."""
    time.sleep(4)  # what the jobs do to start is over, and the lookout has those that rest
    watching = [*supervisor.runners(), supervisor.lookout()]
    before, began = total_cpu_seconds(watching), time.monotonic()
    time.sleep(seconds)
    return (total_cpu_seconds(watching) - before) / (time.monotonic() - began) * 100


def _delay_table(delays: dict[int, Delays]) -> Table:
    columns = [
        "jobs watched",
        "kills",
        "sent p50",
        "sent p99",
        "gone p50",
        "gone p99",
        "above the limit p50, p99",
        "GB/s",
        *(f"CPU, {held}" for held in (FAR, NEAR)),
    ]
    return Table(columns, [_delay_row(watched, of) for watched, of in delays.items()])


def _delay_row(watched: int, of: Delays) -> list[str]:
    def pair(values: list[float]) -> list[str]:
        return [f"{percentile(values, share):.1f} ms" for share in (0.5, 0.99)]

    above = ", ".join(f"{percentile(of.overshoot_mb, share):.1f}" for share in (0.5, 0.99))
    rate = f"{percentile(of.rate_gb, 0.5):.1f}"
    kills = str(len(of.sent_ms))
    return [
        str(watched),
        kills,
        *pair(of.sent_ms),
        *pair(of.gone_ms),
        f"{above} MB",
        rate,
        *(f"{cpu:.1f} %" for cpu in of.cpu.values()),
    ]


# -- in every shape ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timeline:
    """A hog's memory over time: seconds and MB; what the supervisor said; how many processes it was at most."""

    shape: str
    points: list[tuple[float, float]]
    document: dict[str, Any]
    processes: int
    left: int

    @property
    def clean(self) -> bool:
        return self.document.get("reason") == "memory_exceeded" and self.left == 0


def _all_shapes(scale: Scale) -> list[Timeline]:
    with _supervised(scale, 1) as (supervisor, jobs, script):
        (runner,) = supervisor.runners()
        return [_timeline(jobs, script, runner, shape) for shape in hogs.SHAPES]


def _timeline(jobs: Jobs, script: Path, runner: int, shape: str) -> Timeline:
    job_id = jobs.submit(script, shape, 2 * LIMIT_MB, required_memory=LIMIT_MB)
    points: list[tuple[float, float]] = []
    seen: set[ProcessRef] = set()
    highest = 0.0
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        now = time.monotonic()
        usages = tree_usage(runner)
        used = sum(usage.charged for usage in usages.values()) / hogs.MB
        highest = max(highest, used)
        points.append((now, used))
        if used < SPARE_MB < LIMIT_MB / 2 < highest:
            break
        if used > SPARE_MB:
            seen |= _refs(usages)
        time.sleep(SAMPLE_SECONDS)
    document = jobs.wait(job_id)
    left = sum(ref.is_alive() for ref in seen) + len(processes_with_environment("JOB_ID", job_id))
    first = next(at for at, used in points if used > SPARE_MB)
    print(f"  {shape}: {document.get('reason')}, {document.get('error')}")
    return Timeline(shape, [(at - first, used) for at, used in points if at >= first - 0.05], document, len(seen), left)


def _refs(pids: Iterable[int]) -> set[ProcessRef]:
    found = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.add(ProcessRef.of(pid))
    return found


def _shape_table(timelines: list[Timeline]) -> Table:
    rows = [
        [
            one.shape,
            str(one.processes),
            str(one.document.get("reason")),
            f"{one.document.get('peak_memory')} MB",
            str(one.left),
        ]
        for one in timelines
    ]
    return Table([f"shape, limit {LIMIT_MB} MB", "processes", "ended for", "highest reading", "processes left"], rows)


def _plot(timelines: list[Timeline], path: Path) -> None:
    with figure(path, rows=2, columns=3, width=10, height=4.8) as axes:
        for axis, one in zip(axes.flat, timelines, strict=True):
            axis.plot([at * 1000 for at, _ in one.points], [used for _, used in one.points], color=OURS, linewidth=1.3)
            axis.axhline(LIMIT_MB, color=LIMIT, linestyle="--", linewidth=1)
            highest = max(one.points, key=lambda point: point[1])
            axis.plot(highest[0] * 1000, highest[1], marker="x", color=LIMIT)
            axis.set_title(f"{one.shape}\n{one.document.get('error', '')}", fontsize=8)
            axis.set_ylim(0, max(LIMIT_MB * 1.25, highest[1] * 1.05))
            axis.set_xlabel("ms", fontsize=7)
            axis.set_ylabel("MB", fontsize=7)


# -- and nobody else --------------------------------------------------------------------------------------------------


def _steady_jobs(scale: Scale) -> tuple[int, int]:
    """Runs jobs at 95 % of their memory; returns how many, and how many were killed for it."""
    count, workers = scale.of(1000, 8), scale.of(16, 2)
    target = STEADY_LIMIT_MB * 0.95
    with _supervised(scale, workers) as (_, jobs, script):
        for _ in range(count):
            jobs.submit(script, "steady", target, 1.0, required_memory=STEADY_LIMIT_MB)
        collection = jobs.manager.jobs.collection
        final = {"status": {"$in": ["completed", "failed", "cancelled"]}}
        wait_until(lambda: collection.count_documents(final) == count, timeout=1800, what="the steady jobs", pause=0.5)
        killed = collection.count_documents({"reason": "memory_exceeded"})
        other = collection.find_one({"status": {"$ne": "completed"}, "reason": {"$ne": "memory_exceeded"}})
        if other is not None:
            raise RuntimeError(f"a steady job failed: {other['error']}")
    print(f"  {killed} of {count} jobs at 95 % were killed")
    return count, killed


def _steady_table(jobs: int, killed: int) -> Table:
    return Table(
        [f"jobs that stay at 95 % of {STEADY_LIMIT_MB} MB for 1 s and tremble", "killed"], [[f"{jobs:,}", str(killed)]]
    )
