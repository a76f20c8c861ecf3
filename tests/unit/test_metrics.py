"""The numbers that the messages of a pool become, and the limits of their labels."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from supervisor.messages import Beat, ClaimedJob, FinishedJob
from supervisor.metrics import INSTRUMENTS, MAX_QUEUES, OTHER, PREFIX, Metrics, QueueState

BEAT = Beat("running", 0, 0, 0, 0, 0, 0, [], [], [], [], [], [])
CLAIMED = ClaimedJob("t", "id", 1, "default", 64, 0.2)
FINISHED = FinishedJob("t", "id", 1, "completed", None, None, 0, 2.0, 30, None, True, False)

CONTRACT = {
    "info": {"version", "python", "host"},
    "workers": {"state"},
    "worker_restarts_total": {"reason"},
    "jobs": {"status"},
    "queue_jobs": {"queue"},
    "queue_oldest_job_age_seconds": {"queue"},
    "jobs_claimed_total": {"queue"},
    "jobs_finished_total": {"status", "reason"},
    "jobs_reclaimed_total": {"cause"},
    "job_wait_seconds": set(),
    "job_duration_seconds": {"status"},
    "job_peak_memory_bytes": set(),
    "memory_kills_total": set(),
    "memory_kill_delay_seconds": set(),
    "memory_budget_bytes": set(),
    "memory_reserved_bytes": set(),
    "memory_used_bytes": set(),
    "mongo_up": set(),
    "mongo_operation_seconds": {"operation"},
    "mongo_errors_total": {"operation"},
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", host="here")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, labels)


def queues_shown(metrics: Metrics, name: str) -> set[str]:
    families = {family.name: family for family in metrics.registry.collect()}
    return {sample.labels["queue"] for sample in families[PREFIX + name].samples}


def busy(metrics: Metrics) -> Metrics:
    """With something in every series."""
    killed = replace(FINISHED, status="failed", reason="memory_exceeded", kill_delay_seconds=0.004)
    metrics.record(replace(BEAT, claimed=[CLAIMED], finished=[FINISHED, killed], restarts=["died"]))
    metrics.set_queue_state({"pending": 2}, {"default": QueueState(2, 3.5), 'odd "name"\n': QueueState(1, 0.5)})
    metrics.observe_operation("claim", 0.003, False)
    metrics.mongo_up(True)
    return metrics


def test_everything_in_the_contract_is_there_with_its_labels() -> None:
    declared = {instrument.name: set(instrument.labels) for instrument in INSTRUMENTS}
    assert {name: declared.get(name) for name in CONTRACT} == CONTRACT


def test_a_scrape_before_the_first_event_shows_counters_at_zero(metrics: Metrics) -> None:
    assert value(metrics, "jobs_finished_total", status="failed", reason="memory_exceeded") == 0
    assert value(metrics, "jobs_finished_total", status="completed", reason="") == 0
    assert value(metrics, "jobs_reclaimed_total", cause="lease_expired") == 0
    assert value(metrics, "jobs_claimed_total", queue="default") == 0
    assert value(metrics, "memory_kills_total") == 0
    assert value(metrics, "job_duration_seconds_count", status="cancelled") == 0
    assert value(metrics, "jobs", status="pending") is None  # not known yet is not none


def test_the_supervisor_is_described(metrics: Metrics) -> None:
    (sample,) = next(family for family in metrics.registry.collect() if family.name == "supervisor_info").samples
    assert sample.value == 1
    assert sample.labels["version"] == "1.2.3"
    assert sample.labels["host"] == "here"


def test_process_metrics_are_about_the_supervisor() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        metrics = Metrics(supervisor_pid=child.pid)
        started = metrics.registry.get_sample_value("process_start_time_seconds")
        own = Metrics().registry.get_sample_value("process_start_time_seconds")
        assert started is not None
        assert own is not None
        assert started > own
    finally:
        child.kill()
        child.wait()
    assert metrics.registry.get_sample_value("process_open_fds") is None  # gone, and the scrape survives it


def test_a_beat_sets_the_state_of_the_pool(metrics: Metrics) -> None:
    beat = replace(BEAT, idle=1, busy=2, starting=3, budget_mb=1024, reserved_mb=512, used_mb=100)
    metrics.record(replace(beat, restarts=["died", "died", "hung"]))
    assert [value(metrics, "workers", state=state) for state in ("idle", "busy", "starting")] == [1, 2, 3]
    assert value(metrics, "memory_budget_bytes") == 1024 * 2**20
    assert value(metrics, "memory_reserved_bytes") == 512 * 2**20
    assert value(metrics, "memory_used_bytes") == 100 * 2**20
    assert value(metrics, "worker_restarts_total", reason="died") == 2
    assert value(metrics, "worker_restarts_total", reason="hung") == 1


def test_a_claim_counts_and_a_clock_that_runs_behind_makes_no_negative_wait(metrics: Metrics) -> None:
    early = replace(CLAIMED, wait_seconds=-0.5, queue="fast")
    metrics.record(replace(BEAT, claimed=[CLAIMED, early], operations=[("claim", 0.01, True)]))
    assert value(metrics, "jobs_claimed_total", queue="default") == 1
    assert value(metrics, "jobs_claimed_total", queue="fast") == 1
    assert value(metrics, "job_wait_seconds_count") == 2
    assert value(metrics, "job_wait_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "mongo_operation_seconds_count", operation="claim") == 1
    assert value(metrics, "mongo_errors_total", operation="claim") == 0


def test_a_finished_job_counts_with_its_time_and_memory(metrics: Metrics) -> None:
    metrics.record(replace(BEAT, finished=[FINISHED]))
    assert value(metrics, "jobs_finished_total", status="completed", reason="") == 1
    assert value(metrics, "job_duration_seconds_sum", status="completed") == 2
    assert value(metrics, "job_peak_memory_bytes_sum") == 30 * 2**20
    assert value(metrics, "memory_kills_total") == 0


def test_a_memory_kill_counts_with_its_delay(metrics: Metrics) -> None:
    killed = replace(FINISHED, status="failed", reason="memory_exceeded", exit_code=-9, kill_delay_seconds=0.004)
    metrics.record(replace(BEAT, finished=[killed]))
    assert value(metrics, "memory_kills_total") == 1
    assert value(metrics, "memory_kill_delay_seconds_sum") == 0.004
    assert value(metrics, "jobs_finished_total", status="failed", reason="memory_exceeded") == 1


def test_a_timeout_is_no_memory_kill(metrics: Metrics) -> None:
    late = replace(FINISHED, status="failed", reason="timeout", exit_code=-15, kill_delay_seconds=0.004)
    metrics.record(replace(BEAT, finished=[late]))
    assert value(metrics, "memory_kills_total") == 0
    assert value(metrics, "memory_kill_delay_seconds_count") == 0


def finished_in_all(metrics: Metrics) -> float:
    families = {family.name: family for family in metrics.registry.collect()}
    return sum(sample.value for sample in families[PREFIX + "jobs_finished"].samples)


def test_an_attempt_that_is_tried_again_is_no_finished_job(metrics: Metrics) -> None:
    metrics.record(replace(BEAT, finished=[replace(FINISHED, status="pending", reason="exit_code")]))
    assert finished_in_all(metrics) == 0
    assert value(metrics, "jobs_retried_total", reason="exit_code") == 1
    assert value(metrics, "job_duration_seconds_count", status="pending") == 1


def test_a_job_that_was_handed_back_counts_as_reclaimed(metrics: Metrics) -> None:
    metrics.record(replace(BEAT, finished=[replace(FINISHED, status="pending", exit_code=-15)]))
    assert value(metrics, "jobs_reclaimed_total", cause="shutdown") == 1
    assert finished_in_all(metrics) == 0


def test_a_job_that_was_no_longer_ours_counts_apart(metrics: Metrics) -> None:
    metrics.record(replace(BEAT, finished=[replace(FINISHED, held=False)]))
    assert finished_in_all(metrics) == 0
    assert value(metrics, "jobs_disowned_total") == 1


def test_a_job_that_never_ran_has_no_duration(metrics: Metrics) -> None:
    refused = replace(FINISHED, status="failed", reason="invalid_job", duration_seconds=0, peak_memory_mb=None)
    metrics.record(replace(BEAT, finished=[refused]))
    assert value(metrics, "jobs_finished_total", status="failed", reason="invalid_job") == 1
    assert value(metrics, "job_duration_seconds_count", status="failed") == 0
    assert value(metrics, "job_peak_memory_bytes_count") == 0


def test_reclaimed_jobs_count_by_cause(metrics: Metrics) -> None:
    metrics.reclaimed("lease_expired", 3)
    assert value(metrics, "jobs_reclaimed_total", cause="lease_expired") == 3


def test_queues_come_and_go_and_served_ones_stay() -> None:
    metrics = Metrics(queues=("mail", "reports"))
    metrics.set_queue_state({"pending": 4, "failed": 1}, {"mail": QueueState(3, 7.5), "bulk": QueueState(1, 1.0)})
    assert value(metrics, "queue_jobs", queue="mail") == 3
    assert value(metrics, "queue_oldest_job_age_seconds", queue="mail") == 7.5
    assert queues_shown(metrics, "queue_jobs") == {"mail", "reports", "bulk"}
    assert value(metrics, "jobs_claimed_total", queue="bulk") == 0
    metrics.set_queue_state({"failed": 1}, {})
    assert queues_shown(metrics, "queue_jobs") == {"mail", "reports", "bulk"}
    assert queues_shown(metrics, "queue_oldest_job_age_seconds") == {"mail", "reports", "bulk"}
    assert value(metrics, "queue_jobs", queue="bulk") == 0
    assert value(metrics, "queue_oldest_job_age_seconds", queue="mail") == 0
    assert value(metrics, "jobs", status="pending") == 0
    assert value(metrics, "jobs", status="failed") == 1


def test_statuses_that_other_programs_invent_are_folded(metrics: Metrics) -> None:
    metrics.set_queue_state({"pending": 1, "paused": 2, "waiting": 3}, {})
    assert value(metrics, "jobs", status=OTHER) == 5
    metrics.set_queue_state({"pending": 1}, {})
    assert value(metrics, "jobs", status=OTHER) is None


def test_a_thousand_queues_become_a_hundred_series_and_a_rest(metrics: Metrics) -> None:
    names = [f"tenant-{number}" for number in range(1000)]
    metrics.set_queue_state({}, {name: QueueState(1, float(number)) for number, name in enumerate(names)})
    metrics.record(replace(BEAT, claimed=[replace(CLAIMED, queue=name) for name in names]))
    assert len(queues_shown(metrics, "queue_jobs")) == MAX_QUEUES + 1
    assert len(queues_shown(metrics, "jobs_claimed")) == MAX_QUEUES + 1
    assert value(metrics, "queue_jobs", queue=OTHER) == 1000 - (MAX_QUEUES - 1)  # `default` has a place, too
    assert value(metrics, "queue_oldest_job_age_seconds", queue=OTHER) == 999


@pytest.mark.parametrize("queue", ["\ud800", "x" * 100_000, 7, None], ids=["surrogate", "huge", "number", "null"])
def test_the_name_of_a_queue_cannot_break_the_scrape(metrics: Metrics, queue: str) -> None:
    metrics.record(replace(BEAT, claimed=[replace(CLAIMED, queue=queue)]))
    metrics.set_queue_state({}, {queue: QueueState(1, 1.0)})
    assert len(generate_latest(metrics.registry)) < 50_000


def test_the_next_keeper_counts_on(metrics: Metrics) -> None:
    busy(metrics)
    metrics.set_queue_state({}, {"bulk": QueueState(1, 1.0)})
    following = Metrics()
    following.carry_on(metrics.totals())
    assert following.totals() == metrics.totals()
    busy(following)
    for name in ("jobs_finished_total", "memory_kills_total", "job_duration_seconds_count", "job_wait_seconds_sum"):
        assert total(following, name) == pytest.approx(2 * total(metrics, name)) != 0
    following.set_queue_state({}, {})
    assert value(following, "queue_jobs", queue="bulk") == 0


def total(metrics: Metrics, name: str) -> float:
    """The sum over all labels."""
    families = metrics.registry.collect()
    samples = [sample for family in families for sample in family.samples if sample.name == PREFIX + name]
    return sum(sample.value for sample in samples)


def test_both_formats_can_be_parsed(metrics: Metrics) -> None:
    busy(metrics)
    text = {family.name for family in parse_text(generate_latest(metrics.registry).decode())}
    exposed = generate_openmetrics(metrics.registry).decode()
    assert {family.name for family in parse_openmetrics(exposed)} == text
    assert {PREFIX + instrument.name.removesuffix("_total") for instrument in INSTRUMENTS} <= text
    assert not [name for name in text if name.endswith("_created")]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say(metrics: Metrics) -> None:
    exposed = generate_latest(busy(metrics).registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
