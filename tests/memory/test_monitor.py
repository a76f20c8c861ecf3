"""What the monitor reports and what it does not, with real jobs of every shape, forked and executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor.memory.monitor import MB, MemoryMonitor
from supervisor.processes import ProcessRef, processes_with_environment
from tests.support.waiting import wait_until

pytestmark = pytest.mark.alone

REPOSITORY = Path(__file__).parents[2]
START_METHODS = ["exec", "warm"]


def watch(start: str, *shape: object, limit_mb: int, **more: object) -> dict[str, Any]:
    """Runs a job of this shape under a runner with a monitor: see watch.py. Nothing of it is left behind."""
    order = {"start": start, "shape": [str(word) for word in shape], "limit_mb": limit_mb, "preloaded_mb": 30}
    marker = f"{os.getpid()}-{os.urandom(4).hex()}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory.watch", json.dumps(order | more)],
        cwd=REPOSITORY,
        env=os.environ | {"WATCHED_BY": marker},
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    wait_until(lambda: not processes_with_environment("WATCHED_BY", marker), what="all of the job has ended")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("start", START_METHODS)
@pytest.mark.parametrize(
    ("shape", "limit_mb", "processes"),
    [
        (("grow", 1000), 128, 1),
        (("grow_to", 132), 128, 1),
        (("anonymous_mapping", 300), 128, 1),
        (("shared_mapping", 300), 128, 1),
        (("shared_memory_object", 300), 128, 2),
        (("children", 50, 3), 128, 51),
        (("daemonized_grandchild", 300), 128, 2),
        (("forks_that_write", 50, 4), 128, 5),
        (("bomb", 200), 96, None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_job_that_crosses_its_limit_is_reported(
    start: str, shape: tuple[object, ...], limit_mb: int, processes: int | None
) -> None:
    seen = watch(start, *shape, limit_mb=limit_mb)
    overrun = seen["overrun"]
    assert overrun is not None
    assert overrun["limit_mb"] == limit_mb < overrun["used_mb"] <= seen["peak_mb"]
    shares = [share for _, _, share in overrun["shares"]]
    assert len(shares) <= 20
    assert shares == sorted(shares, reverse=True)
    if processes is not None and processes <= 20:
        assert sum(shares) == pytest.approx(overrun["used_mb"])
        assert max(shares) > limit_mb / 5
    assert all(command for _, command, _ in overrun["shares"])


@pytest.mark.parametrize("start", START_METHODS)
@pytest.mark.parametrize(
    ("shape", "limit_mb", "used_mb"),
    [
        (("grow_to", 95), 100, 95),
        (("shared_mapping_of_many", 60, 4), 100, 66),
        (("forks_that_share", 200, 4), 300, 205),
        (("forks_that_map", 200, 4), 230, None),
        (("starts_programs", 120, 150), 160, 122),
        (("children", 20, 3), 128, None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_job_within_its_limit_is_not_reported(
    start: str, shape: tuple[object, ...], limit_mb: int, used_mb: int | None
) -> None:
    seen = watch(start, *shape, limit_mb=limit_mb, looks_after=100)
    assert seen["overrun"] is None
    assert seen["peak_mb"] <= limit_mb
    if used_mb is not None:
        assert seen["exact_mb"] == pytest.approx(used_mb, abs=9)
        assert seen["peak_mb"] == pytest.approx(used_mb, abs=9)


@pytest.mark.parametrize("start", START_METHODS)
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_large_mapped_file_is_not_charged(start: str, access: str, tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as created:
        created.truncate(200 * MB)
    seen = watch(start, "mapped_file", file, access, limit_mb=64, looks_after=30)
    assert seen["overrun"] is None
    assert seen["peak_mb"] < 20


@pytest.mark.parametrize(("written_mb", "limit_mb", "reported"), [(0, 20, False), (40, 60, False), (90, 60, True)])
def test_of_what_a_fork_inherits_only_what_it_writes_is_charged(written_mb: int, limit_mb: int, reported: bool) -> None:
    seen = watch("warm", "inherits", written_mb, limit_mb=limit_mb, preloaded_mb=100, looks_after=30)
    assert (seen["overrun"] is not None) == reported
    assert seen["exact_mb"] == pytest.approx(written_mb, abs=8) or (reported and seen["exact_mb"] > limit_mb)


@pytest.mark.parametrize("start", START_METHODS)
def test_the_series_is_bounded_and_keeps_the_peak_and_the_last(start: str) -> None:
    seen = watch(start, "grow_to", 95, limit_mb=100, looks_after=400, interval=0.02)
    times, values = zip(*seen["series"], strict=True)
    assert seen["looks"] > 400
    assert 10 < len(times) <= 64
    assert list(times) == sorted(times)
    assert max(values) == seen["peak_mb"]
    assert values[-1] == pytest.approx(seen["used_mb"], abs=1)


def test_far_from_the_limit_it_looks_rarely_and_near_it_often() -> None:
    far = MemoryMonitor(os.getpid(), 100_000 * MB, interval=0.1, clock=lambda: 1000.0)
    near = MemoryMonitor(os.getpid(), 40 * MB, interval=0.1, clock=lambda: 1000.0)
    over = MemoryMonitor(os.getpid(), 0, interval=0.1, clock=lambda: 1000.0)
    assert far.next_look == pytest.approx(1000.1)
    assert near.next_look == pytest.approx(1000 + 40 / 4096)
    assert over.next_look == pytest.approx(1000.002)


def test_a_job_without_processes_uses_nothing() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"])
    try:
        monitor = MemoryMonitor(os.getpid(), MB // 16, interval=0.1, skip={child.pid})
        assert monitor.look(monitor.next_look) is None
        assert (monitor.used, monitor.peak) == (0, 0)
        monitor.skip = frozenset()  # the same child, no longer left out
        overrun = None
        while overrun is None:
            overrun = monitor.look(monitor.next_look)
        assert [share.pid for share in overrun.processes] == [child.pid]
        assert "sleep" in overrun.processes[0].command
    finally:
        monitor.close()
        child.kill()
        child.wait()


def test_a_closed_monitor_keeps_no_descriptors() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"])
    try:
        before = os.listdir("/proc/self/fd")
        monitor = MemoryMonitor(os.getpid(), 1000 * MB, interval=0.1)
        assert monitor.look(monitor.next_look) is None
        assert monitor.used > 0
        assert ProcessRef.of(child.pid).is_alive()
        monitor.close()
        assert os.listdir("/proc/self/fd") == before
    finally:
        child.kill()
        child.wait()
