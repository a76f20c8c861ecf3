"""Jobs per second: a script that does nothing, and one that imports numpy and pandas and uses them.

The rounds of all sides are interleaved, so that a slow minute of the machine hits everybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.benchmarks.celery_side import celery_mongo_side, celery_redis_side
from tests.benchmarks.mongo_sides import baseline_side, supervisor_side
from tests.benchmarks.plots import colour_of, figure
from tests.benchmarks.results import Promise, Section, Table, spread
from tests.benchmarks.rq_side import rq_side
from tests.benchmarks.scale import Scale
from tests.benchmarks.scripts import write_scripts
from tests.benchmarks.sides import StartSide

SUPERVISOR, BASELINE, RQ = "supervisor", "polling worker, `python script`", "RQ, fork per job"
CELERY_REDIS, CELERY_MONGO = "Celery on Redis, no process per job", "Celery on MongoDB, no process per job"
NO_OP, PANDAS = "no-op", "numpy+pandas"
MODULES = "numpy,pandas"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A side, and how many jobs it gets: enough for some seconds."""

    name: str
    start: StartSide
    script: str
    jobs: int


CONTESTANTS = [
    Contestant(SUPERVISOR, supervisor_side(SUPERVISOR), NO_OP, 4000),
    Contestant("supervisor, `start_method: exec`", supervisor_side("exec", start_method="exec"), NO_OP, 400),
    Contestant(BASELINE, baseline_side(), NO_OP, 400),
    Contestant(RQ, rq_side(), NO_OP, 600),
    Contestant(CELERY_REDIS, celery_redis_side(), NO_OP, 4000),
    Contestant(CELERY_MONGO, celery_mongo_side(), NO_OP, 2000),
    Contestant(SUPERVISOR, supervisor_side(SUPERVISOR, preload=MODULES), PANDAS, 1000),
    Contestant(BASELINE, baseline_side(), PANDAS, 24),
    Contestant(RQ, rq_side(), PANDAS, 24),
    Contestant("RQ, both imported ahead", rq_side(preload=MODULES), PANDAS, 300),
    Contestant(CELERY_REDIS, celery_redis_side(), PANDAS, 600),
    Contestant(CELERY_MONGO, celery_mongo_side(), PANDAS, 600),
]

Rates = dict[tuple[str, str, int], list[float]]
"""Jobs per second of each round, by name, script and number of workers."""


def measure(scale: Scale) -> Section:
    rates: Rates = {}
    for round_number in range(scale.of(3, 1)):
        for workers in (2, 4):
            for contestant in CONTESTANTS:
                rate = _rate(scale, contestant, workers)
                rates.setdefault((contestant.name, contestant.script, workers), []).append(rate)
                print(
                    f"  round {round_number + 1}: {contestant.name}, {contestant.script}, {workers}: {rate:.1f} jobs/s"
                )
    _plot(rates, scale.plots / "throughput.png")
    return Section(
        title="Throughput",
        about="Jobs per second, all queued at once, from the start of the first to the recorded end of the last; "
        f"median of {scale.of(3, 1)} rounds (lowest to highest), and the supervisor's rate as a multiple. The "
        "supervisor and the polling worker write every outcome with majority and journal to MongoDB; Redis runs "
        "without persistence.",
        tables=[_table(rates, script) for script in (NO_OP, PANDAS)],
        plots=["throughput.png"],
        promises=_promises(rates),
    )


def _rate(scale: Scale, contestant: Contestant, workers: int) -> float:
    directory = scale.fresh("throughput")
    scripts = write_scripts(directory)
    script: Path = scripts.no_op if contestant.script == NO_OP else scripts.pandas
    jobs = scale.of(contestant.jobs, max(4 * workers, contestant.jobs // 20))
    with contestant.start(directory, workers) as side:
        side.run(script, 4 * workers)
        return jobs / side.run(script, jobs)


def _table(rates: Rates, script: str) -> Table:
    rows = []
    ours = {workers: median(rates[SUPERVISOR, script, workers]) for workers in (2, 4)}
    for name in dict.fromkeys(name for name, of, _ in rates if of == script):
        row = [name]
        for workers in (2, 4):
            values = rates[name, script, workers]
            row += [spread(values, 1 if median(values) < 20 else 0), f"{ours[workers] / median(values):.1f} x"]
        rows.append(row)
    return Table([f"{script} script", "2 workers", "ours is", "4 workers", "ours is"], rows)


def _promises(rates: Rates) -> list[Promise]:
    def ratio(name: str, script: str) -> float:
        return median(rates[SUPERVISOR, script, 2]) / median(rates[name, script, 2])

    ours = median(rates[SUPERVISOR, NO_OP, 2])
    return [
        _at_least("no-op scripts, 2 workers, against the polling worker", 5, ratio(BASELINE, NO_OP)),
        _at_least("no-op scripts, 2 workers, against RQ", 4, ratio(RQ, NO_OP)),
        _at_least("numpy+pandas scripts, 2 workers, against the polling worker", 40, ratio(BASELINE, PANDAS)),
        Promise("no-op scripts a second, 2 workers (goal)", "> 741", f"{ours:.0f}", ours > 741),
    ]


def _at_least(what: str, floor: float, measured: float) -> Promise:
    return Promise(what, f"at least {floor:g} x", f"{measured:.1f} x", measured >= floor)


def _plot(rates: Rates, path: Path) -> None:
    with figure(path, columns=2, width=10, height=3.2) as axes:
        for axis, script in zip(axes, (NO_OP, PANDAS), strict=True):
            names = list(dict.fromkeys(name for name, of, _ in rates if of == script))[::-1]
            values = [median(rates[name, script, 2]) for name in names]
            bars = axis.barh(
                [name.replace("`", "") for name in names], values, color=[colour_of(name) for name in names]
            )
            axis.bar_label(
                bars, [f"{value:.0f}" if value >= 20 else f"{value:.1f}" for value in values], fontsize=8, padding=2
            )
            axis.set_title(f"{script}: jobs/s, 2 workers (logarithmic)", fontsize=9)
            axis.set_xscale("log")
            axis.set_xticks([], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlim(right=max(values) * 2)
