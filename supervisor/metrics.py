"""Every metric of this supervisor, declared in one table, and how the messages of the pool become numbers.

Nothing here performs I/O: the keeper records what it hears, and the web server reads the registry. While
MongoDB is away the gauges that come from it keep their last value, and `supervisor_mongo_up` is 0. What only
grows is kept for the keeper that comes after this one: a restart that nobody asked for must not hide itself.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from supervisor.messages import Beat, ClaimedJob, FinishedJob
from supervisor.states import Reason, Status

PREFIX = "supervisor_"
OTHER = "__other__"
"""Stands for every value of a label beyond the number that is kept apart."""
MAX_QUEUES = 100
MAX_WORDS = 50
"""Distinct operations and reasons of restarts. They are words of this program: a bound for its mistakes."""
MAX_LABEL_LENGTH = 128

MEBIBYTE = 2**20
WAIT_BUCKETS = (0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 1800, 3600)
DURATION_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 1800, 3600, 7200, 21600)
MEMORY_BUCKETS = tuple(MEBIBYTE * 2**power for power in range(4, 17))  # 16 MiB to 64 GiB
KILL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
OPERATION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Cause = Literal["startup", "lease_expired", "worker_died", "shutdown"]
Labels = tuple[str, ...]

_FINAL_STATUSES = tuple(status.value for status in Status if status.is_final)
_FAILURES = tuple(reason.value for reason in Reason if reason is not Reason.CANCELLED)
_ENDINGS: tuple[Labels, ...] = (
    (Status.COMPLETED.value, ""),
    *((Status.FAILED.value, reason) for reason in _FAILURES),
    (Status.CANCELLED.value, Reason.CANCELLED.value),
)


_ENDS = ("died", "hung")


def _each(values: Iterable[str]) -> tuple[Labels, ...]:
    return tuple((value,) for value in values)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. `known` are the label values that are shown from the start, at 0."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    help: str
    labels: Labels = ()
    known: tuple[Labels, ...] = ()
    buckets: tuple[float, ...] = field(default=())


INSTRUMENTS = (
    Instrument("gauge", "info", "Always 1; the labels describe this supervisor.", ("version", "python", "host")),
    Instrument(
        "gauge",
        "workers",
        "Workers of the pool, by what they do.",
        ("state",),
        _each(("idle", "busy", "starting")),
    ),
    Instrument(
        "counter",
        "worker_restarts_total",
        "Processes of the pool that were replaced, by the reason.",
        ("reason",),
        _each(
            f"{role}_{end}" for role in ("worker", "runner", "keeper", "lookout", "warm_interpreter") for end in _ENDS
        ),
    ),
    Instrument(
        "gauge",
        "jobs",
        "Jobs in MongoDB, by status; the same from every supervisor of a database, so take max, not sum.",
        ("status",),
    ),
    Instrument(
        "gauge",
        "queue_jobs",
        "Jobs that are due and wait; the same from every supervisor of a database, so take max, not sum.",
        ("queue",),
    ),
    Instrument(
        "gauge",
        "queue_oldest_job_age_seconds",
        "How long the job that waits longest has been due, by queue; 0 when none waits.",
        ("queue",),
    ),
    Instrument("counter", "jobs_claimed_total", "Jobs that this supervisor locked, by queue.", ("queue",)),
    Instrument(
        "counter",
        "jobs_finished_total",
        "Jobs that this supervisor brought to a final status, by status and reason (empty when completed).",
        ("status", "reason"),
        _ENDINGS,
    ),
    Instrument(
        "counter",
        "jobs_retried_total",
        "Attempts that failed and left the job pending for another one, by reason.",
        ("reason",),
        _each(_FAILURES),
    ),
    Instrument(
        "counter",
        "jobs_reclaimed_total",
        "Running jobs that went back to pending because their attempt was lost or handed back, by cause.",
        ("cause",),
        _each(("startup", "lease_expired", "worker_died", "shutdown")),
    ),
    Instrument(
        "counter",
        "jobs_disowned_total",
        "Attempts whose job was no longer this supervisor's when they ended.",
    ),
    Instrument("histogram", "job_wait_seconds", "From the time a job was due to its claim.", buckets=WAIT_BUCKETS),
    Instrument(
        "histogram",
        "job_duration_seconds",
        "Wall-clock time of one attempt, by the status in which it left the job.",
        ("status",),
        _each((*_FINAL_STATUSES, Status.PENDING.value)),
        DURATION_BUCKETS,
    ),
    Instrument(
        "histogram",
        "job_peak_memory_bytes",
        "Highest memory seen of one attempt's whole tree of processes.",
        buckets=MEMORY_BUCKETS,
    ),
    Instrument(
        "gauge",
        "memory_enforcement_info",
        "Always 1; the label says whether jobs are only watched, or limited by the kernel, too.",
        ("mode",),
    ),
    Instrument("counter", "memory_kills_total", "Attempts that were killed because they used more than they may."),
    Instrument(
        "histogram",
        "memory_kill_delay_seconds",
        "From an overrun being seen to the job's whole tree of processes being gone.",
        buckets=KILL_BUCKETS,
    ),
    Instrument("gauge", "memory_budget_bytes", "Memory that running jobs may reserve in all."),
    Instrument("gauge", "memory_reserved_bytes", "Memory that running jobs have reserved (their required_memory)."),
    Instrument("gauge", "memory_used_bytes", "Memory that running jobs use."),
    Instrument("gauge", "mongo_up", "1 while MongoDB is reachable, else 0."),
    Instrument(
        "histogram",
        "mongo_operation_seconds",
        "Time that one operation at MongoDB took, failed ones included.",
        ("operation",),
        buckets=OPERATION_BUCKETS,
    ),
    Instrument("counter", "mongo_errors_total", "Operations at MongoDB that failed.", ("operation",)),
)


class QueueState(NamedTuple):
    """What waits in one queue: jobs that are due, and how long the oldest of them has been."""

    due: int
    oldest_age_seconds: float


class _Words:
    """A bounded set of label values: the first `limit` stay apart, all others are folded into one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def fold(self, value: str) -> str:
        value = str(value)  # a document may hold anything
        if value in self._known:
            return value
        if len(self._known) >= self._limit or not _is_presentable(value):
            return OTHER
        self._known.add(value)
        return value


def _is_presentable(value: str) -> bool:
    try:
        return len(value.encode()) <= MAX_LABEL_LENGTH
    except UnicodeEncodeError:  # a lone surrogate would break every later scrape
        return False


def _children(metric: Any) -> list[tuple[Labels, Any]]:
    """Each series of a metric. The library has no public way to read, or to add to, a histogram as a whole."""
    return list(metric._metrics.items()) if metric._labelnames else [((), metric)]


def _child(metric: Any, labels: list[str]) -> Any:
    return metric.labels(*labels) if labels else metric


class Metrics:
    """The instruments of one supervisor in a registry of their own; safe to use from several threads."""

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        version: str = "unknown",
        host: str | None = None,
        supervisor_pid: int | None = None,
        queues: Iterable[str] = ("default",),
        memory_enforcement: Literal["sampling", "cgroup"] = "sampling",
    ) -> None:
        """`queues` are shown from the start and even when nothing waits in them; `process_*` is about the
        process `supervisor_pid`, this one by default."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each of ours, and no unit in its name
        self.registry = registry or CollectorRegistry(auto_describe=True)
        pid = os.getpid() if supervisor_pid is None else supervisor_pid
        ProcessCollector(pid=lambda: pid, registry=self.registry)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for instrument in INSTRUMENTS:
            self._create(instrument)
        self._queues = _Words(MAX_QUEUES)
        self._operations, self._restarts = _Words(MAX_WORDS), _Words(MAX_WORDS)
        self._served = tuple(self._queues.fold(queue) for queue in queues)
        self._shown: dict[str, set[str]] = {}
        self._gauges["info"].labels(version, platform.python_version(), host or socket.gethostname()).set(1)
        self._gauges["memory_enforcement_info"].labels(memory_enforcement).set(1)
        for queue in self._served:
            self._counters["jobs_claimed_total"].labels(queue)

    def _create(self, instrument: Instrument) -> None:
        name, labels = PREFIX + instrument.name, instrument.labels
        help, registry = instrument.help, self.registry
        metric: Gauge | Counter | Histogram
        if instrument.kind == "gauge":
            metric = self._gauges[instrument.name] = Gauge(name, help, labels, registry=registry)
        elif instrument.kind == "counter":
            metric = self._counters[instrument.name] = Counter(name, help, labels, registry=registry)
        else:
            buckets = instrument.buckets
            metric = Histogram(name, help, labels, registry=registry, buckets=buckets)
            self._histograms[instrument.name] = metric
        for values in instrument.known:
            metric.labels(*values)

    def totals(self) -> bytes:
        """Everything that only grows, as JSON: for the keeper that comes after this one."""
        counters = {
            name: [[labels, child._value.get()] for labels, child in _children(counter)]
            for name, counter in self._counters.items()
        }
        histograms = {
            name: [
                [labels, [one.get() for one in child._buckets], child._sum.get()] for labels, child in _children(each)
            ]
            for name, each in self._histograms.items()
        }
        return json.dumps([counters, histograms]).encode()

    def carry_on(self, totals: bytes) -> None:
        """Adds what an earlier keeper, of this program, has counted."""
        counters, histograms = json.loads(totals)
        for name, series in counters.items():
            for labels, value in series:
                _child(self._counters[name], labels).inc(value)
        for name, series in histograms.items():
            for labels, buckets, total in series:
                child = _child(self._histograms[name], labels)
                for bucket, count in zip(child._buckets, buckets, strict=True):
                    bucket.inc(count)
                child._sum.inc(total)
        claimed_from = (labels[0] for labels, _ in counters["jobs_claimed_total"])
        self._shown["queue_jobs"] = {self._queues.fold(queue) for queue in claimed_from}

    def record(self, beat: Beat) -> None:
        """The state of the pool, and what happened in it since the last beat. Jobs that were handed back are
        counted here as reclaimed; the other causes are the caller's to report."""
        for state, count in (("idle", beat.idle), ("busy", beat.busy), ("starting", beat.starting)):
            self._gauges["workers"].labels(state).set(count)
        memory = {"budget": beat.budget_mb, "reserved": beat.reserved_mb, "used": beat.used_mb}
        for name, megabytes in memory.items():
            self._gauges[f"memory_{name}_bytes"].set(megabytes * MEBIBYTE)
        for reason in beat.restarts:
            self._counters["worker_restarts_total"].labels(self._restarts.fold(reason)).inc()
        for claimed in beat.claimed:
            self._record_claimed(claimed)
        for finished in beat.finished:
            self._record_finished(finished)
        for name, seconds, succeeded in beat.operations:
            self.observe_operation(name, seconds, succeeded)

    def _record_claimed(self, claimed: ClaimedJob) -> None:
        self._counters["jobs_claimed_total"].labels(self._queues.fold(claimed.queue)).inc()
        self._histograms["job_wait_seconds"].observe(max(0.0, claimed.wait_seconds))

    def _record_finished(self, finished: FinishedJob) -> None:
        reason = finished.reason or ""
        if not finished.held:
            self._counters["jobs_disowned_total"].inc()
        elif Status(finished.status).is_final:
            self._counters["jobs_finished_total"].labels(finished.status, reason).inc()
        elif reason:
            self._counters["jobs_retried_total"].labels(reason).inc()
        else:
            self.reclaimed("lease_expired" if finished.cause == "lease_expired" else "shutdown")
        if finished.held and reason not in (Reason.INVALID_JOB, Reason.START_FAILED):  # those never ran
            self._histograms["job_duration_seconds"].labels(finished.status).observe(finished.duration_seconds)
        if finished.peak_memory_mb is not None:
            self._histograms["job_peak_memory_bytes"].observe(finished.peak_memory_mb * MEBIBYTE)
        if reason == Reason.MEMORY_EXCEEDED:
            self._counters["memory_kills_total"].inc()
            if finished.kill_delay_seconds is not None:
                self._histograms["memory_kill_delay_seconds"].observe(finished.kill_delay_seconds)

    def reclaimed(self, cause: Cause, count: int = 1) -> None:
        """`count` running jobs went back to pending."""
        self._counters["jobs_reclaimed_total"].labels(cause).inc(count)

    def ended(self, status: str, reason: str) -> None:
        """A job that was taken back has ended instead of going back to pending."""
        self._counters["jobs_finished_total"].labels(status, reason).inc()

    def set_queue_state(self, jobs_by_status: Mapping[str, int], queues: Mapping[str, QueueState]) -> None:
        """The counts of the whole database. A queue that was seen once stays, at 0, as long as there are not many."""
        statuses = Tally({status.value: 0 for status in Status})
        for status, count in jobs_by_status.items():
            statuses[status if status in statuses else OTHER] += count  # other programs write what they like
        self._replace("jobs", statuses)
        known = sorted(self._shown.get("queue_jobs", set()) | set(self._served))
        due: Tally[str] = Tally(dict.fromkeys(known, 0))
        ages = dict.fromkeys(known, 0.0)
        for queue, state in queues.items():
            name = self._queues.fold(queue)
            due[name] += state.due
            ages[name] = max(ages.get(name, 0.0), state.oldest_age_seconds)
            self._counters["jobs_claimed_total"].labels(name)
        self._replace("queue_jobs", due)
        self._replace("queue_oldest_job_age_seconds", ages)

    def _replace(self, name: str, values: Mapping[str, float]) -> None:
        gauge = self._gauges[name]
        for label, value in values.items():
            gauge.labels(label).set(value)
        for label in self._shown.get(name, set()) - set(values):
            gauge.remove(label)
        self._shown[name] = set(values)

    def observe_operation(self, name: str, seconds: float, ok: bool) -> None:
        """One operation at MongoDB."""
        operation = self._operations.fold(name)
        self._histograms["mongo_operation_seconds"].labels(operation).observe(seconds)
        errors = self._counters["mongo_errors_total"].labels(operation)
        if not ok:
            errors.inc()

    def mongo_up(self, up: bool) -> None:
        """Whether MongoDB can be reached."""
        self._gauges["mongo_up"].set(up)
