"""One chaos run from its seed to its verdict."""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pymongo.errors import PyMongoError

from supervisor.manager import JobManager
from tests.chaos import workload
from tests.chaos.checker import Verdict, check
from tests.chaos.cluster import Cluster, Host, describe
from tests.chaos.history import Expected, History, plain, read_records
from tests.chaos.nemesis import DISK, NETWORK, WEIGHTS, Nemesis, schedule
from tests.support.waiting import wait_until

SETTLE_SECONDS = 60.0
"""A run that makes no progress for so long, with everything mended, hangs."""
TOO_LATE = re.compile(r" spooled_result_too_late | spooled_result_written .*held=(?:no|false)", re.IGNORECASE)
SCRAPE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is made of. The same options make the same workload and the same schedule of faults."""

    seed: int = 1
    jobs: int = 2000
    supervisors: int = 3
    seconds: float = 120.0
    workers: int = 4
    lease_seconds: float = 4.0
    faults_per_second: float = 1.0
    faults: Sequence[str] = tuple(WEIGHTS)
    longest_leases: Sequence[float] = (0.5, 1.0, 2.5)
    """How long faults last at most, in leases; one of these each time."""
    kinds: Sequence[str] = workload.KINDS
    bug: str | None = None
    keep: Path | None = None
    """Where the history goes when the verdict is bad."""


@dataclass(slots=True)
class Result:
    """What a run came to."""

    verdict: Verdict
    history: History
    faults: Counter[str]
    left_out: dict[str, str]
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def succeeded(self) -> bool:
        return self.verdict.holds


def run(options: Options, say: Callable[[str], None] = lambda line: None) -> Result:
    """Runs it all, in the main thread; leaves no process and no file, except `options.keep`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        directory = Path(name)
        (directory / "records").mkdir()
        cluster = Cluster(
            directory,
            supervisors=options.supervisors,
            bug=options.bug,
            clocks="step_clock" in options.faults,
            workers=options.workers,
            lease_seconds=options.lease_seconds,
            task_roots=Path(__file__).parent,
            memory_budget=options.workers * 128,
            kill_grace=0.5,
            shutdown_timeout=3,
            poll_interval=1,
            log_limit=1,
        )
        with cluster:
            result = _Run(options, cluster, say).execute()
            result.seconds = time.monotonic() - began
            if not result.succeeded and options.keep is not None:
                _keep(options.keep, cluster, result.history)
        return result


class _Run:
    def __init__(self, options: Options, cluster: Cluster, say: Callable[[str], None]) -> None:
        self._options = options
        self._cluster = cluster
        self._say = say
        self._manager = JobManager(cluster.replica_set.uri, cluster.db_name)
        self._planned = workload.plan(
            options.seed, options.jobs, lease_seconds=options.lease_seconds, kinds=options.kinds
        )
        self._records = cluster.directory / "records"
        self._documents = [workload.document_of(planned, self._records) for planned in self._planned]
        self._history = History()
        self._over = Event()

    def execute(self) -> Result:
        faults, left_out = self._faults()
        nemesis = Nemesis(self._cluster, faults, self._say)
        with self._manager, self._scraping() as counters, self._submitting():
            for host in self._cluster.hosts:
                host.start(ready=False)
            for host in self._cluster.hosts:
                wait_until(host.runners, timeout=60, what=f"supervisor {host.number} to be up")
            nemesis.run(self._options.seconds if faults else 0.0)
            self._say("everything is mended")
            self._settle(nemesis)
            self._history.undisturbed = not faults
            self._await_metrics(counters)
            self._over.set()
        self._history.metrics = counters.lifetimes
        self._end(nemesis)
        self._read_documents()
        verdict = check(self._history)
        for host in self._cluster.hosts:
            verdict.judge("no result left on disk", not host.spooled(), "", f"{host.number}: {host.spooled()[:5]}")
        statuses = Counter(
            " ".join(filter(None, (document["status"], document.get("reason"))))
            for document in self._history.documents.values()
        )
        return Result(verdict, self._history, nemesis.done, left_out, 0.0, statuses)

    def _faults(self) -> tuple[list[Any], dict[str, str]]:
        options, cluster = self._options, self._cluster
        left_out: dict[str, str] = {}
        if cluster.why_not_enclosed is not None:
            left_out |= dict.fromkeys(NETWORK | DISK, f"no namespaces: {cluster.why_not_enclosed}")
        if cluster.clock is None:
            left_out["step_clock"] = "there is no C compiler"
        left_out = {name: reason for name, reason in left_out.items() if name in options.faults}
        faults = schedule(
            options.seed,
            options.seconds,
            options.supervisors,
            per_second=options.faults_per_second,
            longest_seconds=[leases * options.lease_seconds for leases in options.longest_leases],
            names=[name for name in WEIGHTS if name in options.faults and name not in left_out],
        )
        return faults, left_out

    # -- while it runs ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _submitting(self) -> Iterator[None]:
        """Half of the jobs at once, the others over the time of the faults."""
        pause = self._options.seconds / max(1, len(self._documents)) * 1.5

        def submit() -> None:
            for number, job_id in enumerate(workload.submit(self._manager, self._documents)):
                self._history.acknowledged.append(job_id)
                if number > len(self._documents) / 2 and self._options.faults:
                    time.sleep(pause)

        thread = Thread(target=submit, name="submit", daemon=True)
        thread.start()
        yield
        thread.join(60)

    @contextlib.contextmanager
    def _scraping(self) -> Iterator[Counters]:
        counters = Counters()

        def scrape() -> None:
            while not self._over.wait(SCRAPE_SECONDS):
                counters.scrape(self._cluster.hosts)

        thread = Thread(target=scrape, name="scrape", daemon=True)
        thread.start()
        yield counters
        self._over.set()
        thread.join(10)

    def _settle(self, nemesis: Nemesis) -> None:
        """Waits until every job is final, or nothing moves any more."""
        last, moved_at = -1, time.monotonic()
        while time.monotonic() - moved_at < SETTLE_SECONDS:
            nemesis.look_after_supervisors()
            with contextlib.suppress(PyMongoError):
                final = self._manager.jobs.collection.count_documents(
                    {"status": {"$in": ["completed", "failed", "cancelled"]}}
                )
                if final == len(self._documents):
                    return
                if final != last:
                    self._say(f"{final} of {len(self._documents)} jobs are final")
                    last, moved_at = final, time.monotonic()
            time.sleep(0.5)

    def _await_metrics(self, counters: Counters) -> None:
        deadline = time.monotonic() + 5.0
        while self._history.undisturbed and counters.total() < len(self._documents) and time.monotonic() < deadline:
            time.sleep(SCRAPE_SECONDS)

    # -- when it is over ----------------------------------------------------------------------------------------------

    def _end(self, nemesis: Nemesis) -> None:
        self._history.exits = nemesis.exits
        for host in self._cluster.hosts:
            with contextlib.suppress(ProcessLookupError):
                host.signal(signal.SIGTERM)
        for host in self._cluster.hosts:
            try:
                code = host.wait(60)
            except Exception:
                self._history.exits.append(f"supervisor {host.number} did not end: {host.last_words()}")
                continue
            if code != 0:
                self._history.exits.append(f"supervisor {host.number} exited with {code}: {host.last_words()}")
        deadline = time.monotonic() + 2.0
        while (left := self._cluster.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._history.leftovers = [describe(process) for process in left]

    def _read_documents(self) -> None:
        history = self._history
        offset = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        with JobManager(self._cluster.replica_set.uri, self._cluster.db_name) as manager:
            for found in manager.jobs.collection.find():
                history.documents[str(found["_id"])] = plain(found, offset)
        for planned, document in zip(self._planned, self._documents, strict=True):
            job_id = str(document["_id"])
            if job_id in history.documents:
                history.expected[job_id] = Expected(planned.kind, planned.allows(history.documents[job_id]))
        history.records = read_records(self._records)
        logs = "".join(host.log() for host in self._cluster.hosts)
        history.disowned = len(TOO_LATE.findall(logs))


class Counters:
    """`jobs_finished_total` of every supervisor that was started. Its keepers carry the counts on."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, float], dict[str, float]] = {}

    @property
    def lifetimes(self) -> list[dict[str, float]]:
        return list(self._of.values())

    def scrape(self, hosts: Sequence[Host]) -> None:
        for host in hosts:
            found = host.finished_by_status()
            if found is None:
                continue
            started, counts = found
            known = self._of.setdefault((host.number, started), {})
            for status, value in counts.items():
                known[status] = max(value, known.get(status, 0.0))

    def total(self) -> float:
        return sum(sum(lifetime.values()) for lifetime in self.lifetimes)


def _keep(directory: Path, cluster: Cluster, history: History) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    history.dump(directory / "history.json")
    for host in cluster.hosts:
        (directory / host.log_path.name).write_text(host.log(), "utf-8")
