"""How jobs of all sizes share the memory budget: a simulation of the real `Budget` over a mixed stream.

Simulated are time, arrivals and running times; the decisions are those of the code that runs in the supervisor, beside
two policies that people would otherwise have: whatever fits goes first, and strictly one after the other.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.memory.budget import Budget, Offer
from tests.benchmarks.plots import COLOURS, LIMIT, figure
from tests.benchmarks.results import Promise, Section, Table, percentile
from tests.benchmarks.scale import Scale

TOTAL_MB = 8192
SLOTS = 96
PATIENCE_SECONDS = 10.0
HEAD_REPORT_SECONDS = 1.0
LONGEST_SECONDS = 120.0
LOAD = 0.85
"""Memory asked for, times running time, as a share of what there is."""
SEED = 4
LAYERS = ["#9ecae1", "#4292c6", "#08519c"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of job: its share of the stream, its sizes in MB, and its mean running time."""

    name: str
    share: float
    sizes: tuple[int, ...]
    seconds: float


KINDS = (
    Kind("small, 64 to 256 MB", 0.97, (64, 128, 256), 8.0),
    Kind("medium, 512 MB to 1 GB", 0.025, (512, 1024), 20.0),
    Kind("large, 4 to 6 GB", 0.005, (4096, 6144), 40.0),
)
LARGE = KINDS[-1]


@dataclass(slots=True)
class SimulatedJob:
    """Times in seconds."""

    kind: Kind
    mb: int
    seconds: float
    due: float
    first_at: float | None = None
    """Since when no job before it waited."""
    started: float | None = None


@dataclass(slots=True)
class Run:
    """What came of one policy."""

    jobs: list[SimulatedJob]
    used: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    """MB in use from this time on, by kind of job."""

    def utilisation(self, begin: float, end: float) -> float:
        area = 0.0
        for (at, used), (until, _) in zip(self.used, [*self.used[1:], (end, ())], strict=True):
            area += sum(used) * max(0.0, min(until, end) - max(at, begin))
        return area / (TOTAL_MB * (end - begin))


Grant = Callable[[float, list[SimulatedJob], list[int]], list[tuple[int, SimulatedJob]]]
"""Which waiting jobs start now, in which of the idle slots."""


def stream(seconds: float) -> list[SimulatedJob]:
    """Jobs that come at random and need, together, `LOAD` of the memory."""
    random_numbers = random.Random(SEED)
    mean = sum(kind.share * kind.seconds * sum(kind.sizes) / len(kind.sizes) for kind in KINDS)
    interval = mean / (LOAD * TOTAL_MB)
    jobs: list[SimulatedJob] = []
    now = random_numbers.expovariate(1 / interval)
    while now < seconds:
        kind = random_numbers.choices(KINDS, [kind.share for kind in KINDS])[0]
        runs = min(LONGEST_SECONDS, random_numbers.expovariate(1 / kind.seconds))
        jobs.append(SimulatedJob(kind, random_numbers.choice(kind.sizes), runs, now))
        now += random_numbers.expovariate(1 / interval)
    return jobs


# -- the policies -----------------------------------------------------------------------------------------------------


class Ours:
    """The supervisor's budget, asked as the supervisor asks it."""

    def __init__(self) -> None:
        self.budget = Budget(TOTAL_MB, PATIENCE_SECONDS)

    def grant(self, now: float, waiting: list[SimulatedJob], idle: list[int]) -> list[tuple[int, SimulatedJob]]:
        self.budget.head(now, waiting[0].mb if waiting and self.budget.reserved else None)
        offers: list[tuple[int, Offer]] = []
        for number, slot in enumerate(idle):
            offer = self.budget.offer(now, slot, idle=len(idle) - number)
            if offer is not None:
                offers.append((slot, offer))
        started: list[tuple[int, SimulatedJob]] = []
        asked: dict[Hashable, tuple[int, SimulatedJob]] = {}
        left = list(waiting)
        for slot, offer in offers:
            job = next((job for job in left if job.mb <= offer.limit_mb), None)
            if job is None:
                self.budget.settle(slot, None)
                continue
            left.remove(job)
            if job.mb <= offer.sure_mb:
                self.budget.settle(slot, job.mb)
                started.append((slot, job))
            else:
                self.budget.ask(slot, job.mb)
                asked[slot] = slot, job
        started += [asked[key] for key, fits in self.budget.answers() if fits]
        for _, job in started:
            job.started = now
        return started

    def release(self, slot: int, job: SimulatedJob) -> None:
        self.budget.release(slot)


class Plain:
    """Starts jobs in their order: whatever fits, or (`strict`) nothing before the first one fits."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.free = TOTAL_MB

    def grant(self, now: float, waiting: list[SimulatedJob], idle: list[int]) -> list[tuple[int, SimulatedJob]]:
        started = []
        slots = iter(idle)
        for job in waiting:
            if job.mb <= self.free:
                slot = next(slots, None)
                if slot is None:
                    break
                self.free -= job.mb
                job.started = now
                started.append((slot, job))
            elif self.strict:
                break
        return started

    def release(self, slot: int, job: SimulatedJob) -> None:
        self.free += job.mb


# -- the simulation ---------------------------------------------------------------------------------------------------


def simulate(policy: Ours | Plain, jobs: list[SimulatedJob], until: float) -> Run:
    """Runs the stream; what has not started by then is still waiting."""
    run = Run(jobs)
    arrivals = iter([*jobs, None])
    coming = next(arrivals)
    idle = list(range(SLOTS))
    waiting: list[SimulatedJob] = []
    ends: list[tuple[float, int, SimulatedJob]] = []
    used = dict.fromkeys(KINDS, 0)
    now, look_at = 0.0, 0.0
    while now < until:
        now = min(coming.due if coming else until, ends[0][0] if ends else until, look_at)
        while ends and ends[0][0] <= now:
            _, slot, job = heapq.heappop(ends)
            policy.release(slot, job)
            used[job.kind] -= job.mb
            idle.append(slot)
        while coming and coming.due <= now:
            waiting.append(coming)
            coming = next(arrivals)
        while started := policy.grant(now, waiting, idle):
            for slot, job in started:
                idle.remove(slot)
                waiting.remove(job)
                used[job.kind] += job.mb
                heapq.heappush(ends, (now + job.seconds, slot, job))
        if waiting and waiting[0].first_at is None:
            waiting[0].first_at = now
        run.used.append((now, tuple(used.values())))
        look_at = now + HEAD_REPORT_SECONDS
    return run


def waits(run: Run, kind: Kind, until: float) -> list[float]:
    """Seconds that its jobs waited; those that still wait count with what they have waited so far."""
    return [(job.started if job.started is not None else until) - job.due for job in run.jobs if job.kind is kind]


def at_the_head(run: Run, kind: Kind, until: float) -> float:
    """The longest time that a job waited with nobody before it."""
    times = [
        (job.started if job.started is not None else until) - job.first_at
        for job in run.jobs
        if job.kind is kind and job.first_at is not None
    ]
    return max(times, default=0.0)


# -- the report -------------------------------------------------------------------------------------------------------


def measure(scale: Scale) -> Section:
    seconds = float(scale.of(6 * 3600, 3600))
    policies: dict[str, Ours | Plain] = {
        "supervisor": Ours(),
        "whatever fits first": Plain(strict=False),
        "strictly in order": Plain(strict=True),
    }
    runs = {name: simulate(policy, stream(seconds), seconds) for name, policy in policies.items()}
    rows = [row for name, run in runs.items() for row in _rows(name, run, seconds)]
    _plot(runs, seconds, scale.plots / "packing.png")
    bound = PATIENCE_SECONDS + LONGEST_SECONDS + 2 * HEAD_REPORT_SECONDS
    longest = at_the_head(runs["supervisor"], LARGE, seconds)
    return Section(
        title="Packing",
        about=f"Simulation, not measurement: {seconds / 3600:g} h of a mixed stream that asks for {LOAD:.0%} of "
        f"{TOTAL_MB} MB, {SLOTS} workers, running times up to {LONGEST_SECONDS:g} s. The bound on how long the largest "
        f"job waits once it is the first: the patience of {PATIENCE_SECONDS:g} s, the longest run of those that run "
        f"then, and the pace of the reports: {bound:g} s.",
        tables=[
            Table(
                ["policy", "memory in use", "jobs", "waited p50, s", "p95, s", "max, s", "longest as the first, s"],
                rows,
            )
        ],
        plots=["packing.png"],
        promises=[
            Promise(
                "large job, longest wait as the first in line, s",
                f"within {bound:g}",
                f"{longest:.0f}",
                longest <= bound,
            )
        ],
    )


def _rows(name: str, run: Run, seconds: float) -> list[list[str]]:
    rows = []
    for kind in KINDS:
        times = waits(run, kind, seconds)
        rows.append(
            [
                name,
                f"{run.utilisation(seconds / 8, seconds):.0%}",
                f"{len(times)} {kind.name}",
                *(f"{percentile(times, share):.1f}" for share in (0.5, 0.95)),
                f"{max(times):.0f}",
                f"{at_the_head(run, kind, seconds):.0f}",
            ]
        )
    return rows


def _plot(runs: dict[str, Run], seconds: float, path: Path) -> None:
    with figure(path, columns=2, width=10, height=3.4) as (left, right):
        for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
            for kind, line in zip((KINDS[0], LARGE), ("-", "--"), strict=True):
                times = sorted(max(0.1, wait) for wait in waits(run, kind, seconds))
                shares = [(index + 1) / len(times) * 100 for index in range(len(times))]
                left.plot(times, shares, line, color=colour, label=f"{name}: {kind.name.split(',')[0]}")
        left.set_xscale("log")
        left.set_xlabel("seconds waited (none is drawn as 0.1)", fontsize=8)
        left.set_ylabel("% of jobs", fontsize=8)
        left.legend(fontsize=6)
        begin = seconds / 2
        window = [(at - begin, used) for at, used in runs["supervisor"].used if begin <= at <= begin + 1800]
        layers = [[used[index] for _, used in window] for index in range(len(KINDS))]
        right.stackplot(
            [at for at, _ in window], layers, labels=[kind.name for kind in KINDS], step="post", colors=LAYERS
        )
        right.axhline(TOTAL_MB, color=LIMIT, linestyle=":", linewidth=1)
        right.set_ylim(0, TOTAL_MB * 1.05)
        right.set_title("the supervisor's memory budget", fontsize=9)
        right.set_xlabel("seconds, half an hour", fontsize=8)
        right.set_ylabel("MB reserved", fontsize=8)
        right.legend(fontsize=6, loc="lower left")
