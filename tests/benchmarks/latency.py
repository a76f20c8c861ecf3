"""From the insert to the first line of the script, on an idle pool of two workers.

The script's first line reads CLOCK_MONOTONIC, which all processes share, and then sends it through a named pipe.
The clock starts right before the call that queues the job.
"""

from __future__ import annotations

import os
import random
import select
import time
from pathlib import Path

from tests.benchmarks.celery_side import celery_redis_side
from tests.benchmarks.mongo_sides import BASELINE_POLL_SECONDS, baseline_side, supervisor_side
from tests.benchmarks.plots import COLOURS, figure
from tests.benchmarks.results import Promise, Section, Table, percentile
from tests.benchmarks.rq_side import rq_side
from tests.benchmarks.scale import Scale
from tests.benchmarks.scripts import write_scripts
from tests.benchmarks.sides import Side, StartSide

SUPERVISOR, BASELINE = "supervisor", "polling worker"
CONTESTANTS: dict[str, tuple[StartSide, int]] = {
    SUPERVISOR: (supervisor_side(), 500),
    "supervisor, numpy and pandas preloaded": (supervisor_side(preload="numpy,pandas"), 500),
    "supervisor, `start_method: exec`": (supervisor_side(start_method="exec"), 200),
    "RQ, fork per job": (rq_side(), 300),
    "Celery on Redis, no process per job": (celery_redis_side(), 500),
    BASELINE: (baseline_side(), 40),
}
WAIT_SECONDS = 60.0


def measure(scale: Scale) -> Section:
    latencies: dict[str, list[float]] = {}
    rounds = scale.of(2, 1)
    for _ in range(rounds):
        for name, (start, samples) in CONTESTANTS.items():
            found = _latencies(scale, start, scale.of(samples // rounds, 8))
            latencies.setdefault(name, []).extend(found)
            print(f"  {name}: p50 {percentile(found, 0.5):.1f} ms, p99 {percentile(found, 0.99):.1f} ms")
    _plot(latencies, scale.plots / "latency.png")
    rows = [
        [
            name,
            str(len(values)),
            *(f"{percentile(values, share):.1f}" for share in (0.5, 0.9, 0.99)),
            f"{max(values):.1f}",
        ]
        for name, values in latencies.items()
    ]
    ours = latencies[SUPERVISOR]
    return Section(
        title="Latency",
        about="Milliseconds from the insert to the first line of the script, idle pool, 2 workers, one job at a time. "
        f"The polling worker sleeps {BASELINE_POLL_SECONDS:g} s when it finds nothing.",
        tables=[Table(["insert to first line, ms", "jobs", "p50", "p90", "p99", "max"], rows)],
        plots=["latency.png"],
        promises=[
            _below("insert to first line, p50, ms", 8, percentile(ours, 0.5)),
            _below("insert to first line, p99, ms", 20, percentile(ours, 0.99)),
        ],
    )


def _below(what: str, bound: float, measured: float) -> Promise:
    return Promise(what, f"below {bound:g}", f"{measured:.1f}", measured < bound)


def _latencies(scale: Scale, start: StartSide, samples: int) -> list[float]:
    directory = scale.fresh("latency")
    scripts = write_scripts(directory)
    pipe = directory / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # held open for writing too: it never ends
    try:
        with start(directory, 2) as side:
            for _ in range(5):
                _one(side, scripts.first_line, pipe, reader)
            return [_one(side, scripts.first_line, pipe, reader) for _ in range(samples)]
    finally:
        os.close(reader)


def _one(side: Side, script: Path, pipe: Path, reader: int) -> float:
    time.sleep(random.uniform(0.1, 0.2))  # until the pool is idle again; at random, so that no period is met
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    side.submit(script, str(pipe))
    if not select.select([reader], [], [], WAIT_SECONDS)[0]:
        raise TimeoutError(f"{side.name} has not run the job within {WAIT_SECONDS:g} s")
    return (int(os.read(reader, 100)) - began) / 1e6


def _plot(latencies: dict[str, list[float]], path: Path) -> None:
    with figure(path) as axis:
        for (name, values), colour in zip(latencies.items(), COLOURS, strict=False):
            ordered = sorted(values)
            shares = [(index + 1) / len(ordered) * 100 for index in range(len(ordered))]
            axis.plot(ordered, shares, label=name.replace("`", ""), color=colour, linewidth=1.5)
        axis.set_xscale("log")
        axis.set_xlabel("ms from the insert to the first line of the script", fontsize=8)
        axis.set_ylabel("% of jobs", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
