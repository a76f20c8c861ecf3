"""How far one replica set carries: claims per second of many workers in many supervisors, and what is full first.

    python -m tests.benchmarks.capacity [--seconds 5] [--workers 1,4,16,64] [--supervisors 1,4,8] [--json FILE]

Claimers stand for workers: they claim with `JobStore.claim` (one by one) or `claim_ahead` (16 at once) and write each
outcome, and run nothing in between. The workers of one supervisor are threads of one process, as connections are what
the server sees; supervisors are processes. A model is fitted to the table: n workers that need `think` seconds of
their own and one server that needs `serve` seconds per job give min(n / (think + serve), 1 / serve) jobs per second,
with `serve` growing by `meet` for each further worker (they meet at the head of the queue). What the processors of
the host did meanwhile says whether `serve` is MongoDB's own or the claimers'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
from pymongo import MongoClient

from supervisor.job import Counts, JobSpec, Outcome, decide
from supervisor.manager import new_document
from supervisor.store import transitions
from supervisor.store.client import connect
from supervisor.store.jobs import JobStore
from supervisor.store.transitions import Demand, Owner
from tests.support.mongod import MongoServer

DATABASE = "capacity"
BACKLOG = 200_000
AHEAD = 16
LEASE_SECONDS = 600.0
Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Who claims, and how."""

    supervisors: int
    workers: int
    """In all supervisors together."""
    ahead: int
    """Jobs of one claim."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of it."""

    load: Load
    per_second: float
    """Jobs that were claimed and finished."""
    claim_ms: float
    """The median of one claim."""
    server_cores: float
    claimer_cores: float
    host_cores: float
    """Of everybody on this host: more than the two above together means that the machine was not quiet."""
    conflicts: float
    """Writes that met another one and were made again by the server, for each job."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """jobs per second = min(n / (think + serve(n)), 1 / serve(n)), serve(n) = serve + meet * (n - 1)"""

    think: float
    serve: float
    meet: float
    error: float
    """The mean of the relative errors."""

    def per_second(self, workers: int) -> float:
        serve = self.serve + self.meet * (workers - 1)
        return min(workers / (self.think + serve), 1 / serve)


# -- claimers ---------------------------------------------------------------------------------------------------------


def claim_and_finish(store: JobStore, name: str, ahead: int, until: float) -> tuple[int, list[float]]:
    """Works like a worker whose jobs take no time; returns how many jobs, and the seconds of each claim."""
    owner = Owner(supervisor_id=name.partition("/")[0], host="here", worker_pid=1, worker=name)
    jobs, seconds = 0, []
    while time.monotonic() < until:
        token, began = secrets.token_hex(12), time.monotonic()
        if ahead > 1:
            claimed = store.claim_ahead(owner, token, Demand(limit_mb=4096), LEASE_SECONDS, ahead)
        else:
            found = store.claim(owner, token, Demand(limit_mb=4096), LEASE_SECONDS)
            claimed = [found] if found is not None else []
        seconds.append(time.monotonic() - began)
        if claimed:
            store.apply_all([_finish(document) for document in claimed], "finish")
            jobs += len(claimed)
    return jobs, seconds


def _finish(document: Document) -> transitions.Move:
    counts, outcome = Counts.from_document(document), Outcome(exit_code=0, peak_memory_mb=8)
    verdict = decide(JobSpec.from_document(document), counts, outcome)
    number = counts.attempts + (document["lock"].get("ahead") is True)
    return transitions.finish(
        document["_id"], document["lock"]["token"], outcome, verdict,
        attempt=number, details={"duration_seconds": 0.0}, lines=[verdict.note],
    )  # fmt: skip


def simulated_supervisor(
    uri: str, workers: int, ahead: int, seconds: float, start: Barrier, answers: multiprocessing.Queue[Any]
) -> None:
    """Runs its workers as threads, each with a connection of its own pool as a real worker has."""
    name = f"simulated-{secrets.token_hex(4)}"
    stores = []
    for _ in range(workers):
        client = connect(uri, app="capacity")
        client.admin.command("ping")
        stores.append(JobStore(client, DATABASE, "jobs", uri=uri))
    results: list[tuple[int, list[float]]] = []
    start.wait()
    until = time.monotonic() + seconds

    def work(number: int, store: JobStore) -> None:
        results.append(claim_and_finish(store, f"{name}/{number}", ahead, until))

    before = time.process_time()
    threads = [Thread(target=work, args=pair) for pair in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claims = list(itertools.chain.from_iterable(claims for _, claims in results))
    answers.put((sum(jobs for jobs, _ in results), claims, time.process_time() - before))


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(server: MongoServer, load: Load, seconds: float, backlog: int) -> Measured:
    """One cell of the table, on a full queue."""
    fill(server.uri, backlog)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(load.supervisors + 1), context.Queue()
    shares = [len(range(index, load.workers, load.supervisors)) for index in range(load.supervisors)]
    processes = [
        context.Process(target=simulated_supervisor, args=(server.uri, share, load.ahead, seconds, start, answers))
        for share in shares
    ]
    for process in processes:
        process.start()
    mongod = psutil.Process(server.pid)
    conflicts = write_conflicts(server.uri)
    start.wait()
    began, before, host = time.monotonic(), mongod.cpu_times(), busy_seconds()
    results = [answers.get(timeout=seconds + 60) for _ in processes]
    elapsed, after, host_after = time.monotonic() - began, mongod.cpu_times(), busy_seconds()
    for process in processes:
        process.join()
    claims = sorted(itertools.chain.from_iterable(result[1] for result in results))
    used = after.user + after.system - before.user - before.system
    jobs = sum(result[0] for result in results)
    return Measured(
        load=load,
        per_second=jobs / elapsed,
        claim_ms=claims[len(claims) // 2] * 1000 if claims else 0.0,
        server_cores=used / elapsed,
        claimer_cores=sum(result[2] for result in results) / elapsed,
        host_cores=(host_after - host) / elapsed,
        conflicts=(write_conflicts(server.uri) - conflicts) / max(1, jobs),
    )


def busy_seconds() -> float:
    """Seconds that all processors of this host have worked, or were kept from it by other machines."""
    times = psutil.cpu_times()
    waited = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
    return float(sum(seconds for name, seconds in times._asdict().items() if name not in waited))


def write_conflicts(uri: str) -> int:
    with MongoClient[Document](uri) as client:
        return int(client.admin.command("serverStatus")["metrics"]["operation"]["writeConflicts"])


def fill(uri: str, backlog: int) -> None:
    """A queue that no measurement empties."""
    with MongoClient[Document](uri) as client:
        jobs = client[DATABASE]["jobs"]
        jobs.delete_many({"status": {"$ne": "pending"}})
        missing = backlog - jobs.count_documents({})
        for count in range(0, missing, 10_000):
            size = min(10_000, missing - count)
            jobs.insert_many([new_document("capacity", "/job.py") for _ in range(size)], ordered=False)


# -- the model --------------------------------------------------------------------------------------------------------


def fit(measured: Sequence[Measured]) -> Model:
    """The model with the least relative error, by looking ever closer around the best one so far."""
    best = Model(think=1e-3, serve=5e-4, meet=1e-6, error=float("inf"))
    for spread in (10.0, 3.0, 1.5, 1.2, 1.05, 1.01):
        steps = [spread ** (step / 3) for step in range(-3, 4)]
        for think, serve, meet in itertools.product(steps, steps, (0.0, *steps)):
            model = Model(think=best.think * think, serve=best.serve * serve, meet=best.meet * meet, error=0.0)
            found = sum(abs(model.per_second(m.load.workers) / m.per_second - 1) for m in measured) / len(measured)
            if found < best.error:
                best = Model(think=model.think, serve=model.serve, meet=max(model.meet, 1e-9), error=found)
    return best


def bottleneck(measured: Sequence[Measured], model: Model) -> str:
    """One sentence: what is full first."""
    cores = psutil.cpu_count() or 1
    fastest = max(measured, key=lambda m: m.per_second)
    ours = fastest.server_cores + fastest.claimer_cores
    crowded = max(measured, key=lambda m: m.conflicts)
    full = next((n for n in range(1, 1025) if model.per_second(n + 1) <= model.per_second(n) * 1.01), 1024)
    sentence = (
        f"{fastest.per_second:,.0f} jobs/s at most ({fastest.load.workers} workers in {fastest.load.supervisors} "
        f"supervisors); by the model more workers than {full} bring nothing. "
    )
    if fastest.host_cores - ours > 0.25 * cores:
        sentence += f"(This host was not quiet: others used {fastest.host_cores - ours:.1f} processors.) "
    if fastest.host_cores > 0.85 * cores:
        share = fastest.server_cores / ours
        where = "mongod" if share > 0.6 else "the claimers" if share < 0.4 else "mongod and the claimers alike"
        return sentence + f"First bottleneck: the {cores} processors of this host, used mostly by {where}."
    if crowded.conflicts > 1:
        return sentence + (
            f"First bottleneck: workers that meet at the head of the queue ({crowded.conflicts:.1f} write conflicts "
            f"for each job with {crowded.load.workers} workers)."
        )
    return sentence + "First bottleneck: waiting (commits that are flushed together), not processors or conflicts."


def table(measured: Sequence[Measured]) -> str:
    names = ("jobs per claim", "supervisors", "workers", "jobs/s", "claim, median", "conflicts per job",
             "cores: mongod", "claimers", "host")  # fmt: skip
    lines = [f"| {' | '.join(names)} |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    lines += [
        f"| {m.load.ahead} | {m.load.supervisors} | {m.load.workers} | {m.per_second:,.0f} | {m.claim_ms:.1f} ms "
        f"| {m.conflicts:.2f} | {m.server_cores:.2f} | {m.claimer_cores:.2f} | {m.host_cores:.2f} |"
        for m in measured
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    parser.add_argument("--workers", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--supervisors", type=numbers, default=[1, 4, 8])
    parser.add_argument("--backlog", type=int, default=BACKLOG, help="jobs that wait (default 200000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    options = parser.parse_args(argv)
    report: Document = {"cores": psutil.cpu_count(), "backlog": options.backlog, "measured": [], "models": {}}
    with MongoServer() as server:
        JobStore(connect(server.uri, app="capacity"), DATABASE, "jobs", uri=server.uri).ensure_indexes()
        for ahead in (1, AHEAD):
            measured = []
            for supervisors, workers in itertools.product(options.supervisors, options.workers):
                if workers >= supervisors:
                    load = Load(supervisors=supervisors, workers=workers, ahead=ahead)
                    measured.append(measure(server, load, options.seconds, options.backlog))
                    print(table(measured[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            model = fit(measured)
            print(f"\n{table(measured)}\n")
            print(
                f"Model: think {model.think * 1000:.2f} ms, serve {model.serve * 1000:.3f} ms, "
                f"meet {model.meet * 1e6:.1f} µs per further worker; mean error {model.error:.0%}."
            )
            print(bottleneck(measured, model), flush=True)
            report["measured"] += [asdict(m) for m in measured]
            report["models"][f"{ahead} per claim"] = asdict(model)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
