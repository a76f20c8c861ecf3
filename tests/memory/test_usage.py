"""Exact usage: each page once, and nothing that is not the job's own. The test process is the runner."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor.memory import usage
from supervisor.memory.usage import CheapReading, ProcessUsage, tree_usage
from tests.memory import shapes

MB = 1 << 20

# The test process may have a database client's threads; its children here only take memory and wait.
pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


class Jobs:
    """Children of the test process, each of which says when it is ready and then stays."""

    def __init__(self) -> None:
        self._pids: list[int] = []

    def fork(self, work: Callable[[], object]) -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writer, 1)
            try:
                kept = work()
                shapes.hold()
                del kept
            finally:
                os._exit(1)
        self._pids.append(pid)
        os.close(writer)
        assert os.read(reader, 1), "the job has ended by itself"
        os.close(reader)
        return pid

    def execute(self, *shape: object) -> int:
        command = [sys.executable, shapes.__file__, *map(str, shape)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._pids.append(job.pid)
        assert job.stdout is not None
        with job.stdout:
            assert job.stdout.read(1), "the job has ended by itself"
        job.returncode = 0  # reaped by end()
        return job.pid

    def end(self) -> None:
        for pid in self._pids:
            for below in usage.descendants(pid):
                os.kill(below, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    gc.collect()
    gc.freeze()  # as in a runner: a collection in a child would write to every page with Python objects
    yield jobs
    gc.unfreeze()
    jobs.end()


def charged_mb(only: int | None = None) -> float:
    usages = tree_usage(os.getpid())
    return sum(one.charged for one in usages.values() if only in (None, one.pid)) / MB


def test_an_idle_fork_is_charged_next_to_nothing(jobs: Jobs) -> None:
    ballast = shapes.filled(150)
    jobs.fork(lambda: None)
    jobs.fork(lambda: None)
    assert charged_mb() < 6
    del ballast


def test_what_a_fork_writes_is_charged(jobs: Jobs) -> None:
    ballast = memoryview(shapes.filled(100))
    jobs.fork(lambda: shapes.touch(ballast, 0, 40 * MB))
    jobs.fork(lambda: shapes.filled(25))
    assert charged_mb() == pytest.approx(65, abs=7)


def test_what_the_runner_alone_has_is_not_charged_when_a_fork_drops_it(jobs: Jobs) -> None:
    """The runner's share must not be taken from memory that the job took for itself."""
    ballast = mmap.mmap(-1, 100 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shapes.touch(ballast, 0, 100 * MB)
    jobs.fork(lambda: None)  # shares it with the runner, so that the runner's share is large

    def drops_it() -> bytearray:
        ballast.close()
        return shapes.filled(80)

    job = jobs.fork(drops_it)
    assert charged_mb(only=job) == pytest.approx(80, abs=5)
    ballast.close()


def test_an_executed_program_is_charged_all_it_has(jobs: Jobs) -> None:
    job = jobs.execute("anonymous_mapping", 50)
    assert charged_mb(only=job) == pytest.approx(50 + 7, abs=4)


def test_pages_shared_within_the_job_count_once(jobs: Jobs) -> None:
    jobs.execute("forks_that_share", 100, 4)
    assert len(tree_usage(os.getpid())) == 5
    assert charged_mb() == pytest.approx(100 + 10, abs=6)


def test_shared_memory_counts_once_and_in_full(jobs: Jobs) -> None:
    memory = mmap.mmap(-1, 60 * MB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    for _ in range(3):
        jobs.fork(lambda: shapes.touch(memory, 0, 60 * MB))
    usages = tree_usage(os.getpid()).values()
    assert [one.shared / MB for one in usages] == pytest.approx([20, 20, 20], abs=0.1)
    assert sum(one.charged for one in usages) / MB == pytest.approx(60, abs=6)
    memory.close()


@pytest.mark.parametrize("access", ["read", "write"])
def test_mapped_files_are_not_charged(jobs: Jobs, access: str, tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as created:
        created.truncate(100 * MB)
    jobs.fork(lambda: shapes.mapped_file(str(file), access))
    assert charged_mb() < 6


def test_a_process_that_runs_in_its_parents_memory_is_left_out(tmp_path: Path) -> None:
    """Between vfork and exec: held there, because posix_spawn opens files in the child, and this one blocks."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ballast = shapes.filled(50)
    parent = os.fork()
    if parent == 0:
        actions = [(os.POSIX_SPAWN_OPEN, 0, str(fifo), os.O_RDONLY, 0)]
        os.posix_spawn("/bin/true", ["/bin/true"], {}, file_actions=actions)
        os._exit(0)
    try:
        while not usage.descendants(parent):
            assert os.waitpid(parent, os.WNOHANG) == (0, 0)
        (child,) = usage.descendants(parent)
        assert set(tree_usage(os.getpid())) == {parent}
        process = usage.process_stat(child)
        assert process is not None
        assert process.parent == parent
    finally:
        with fifo.open("wb"):
            pass
        os.waitpid(parent, 0)
    del ballast


def test_only_as_many_are_read_as_are_needed_to_know(jobs: Jobs) -> None:
    jobs.execute("children", 25, 1)
    assert len(tree_usage(os.getpid(), enough=0)) == 20
    assert len(tree_usage(os.getpid(), enough=10_000 * MB)) == 26
    assert len(tree_usage(os.getpid())) == 26


def test_processes_that_are_gone_or_skipped_count_nothing(jobs: Jobs) -> None:
    job = jobs.fork(lambda: None)
    assert tree_usage(os.getpid(), skip={job}) == {}
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    assert set(tree_usage(os.getpid(), pids=[job, gone.pid])) == {job}


def test_where_pages_are_hidden_the_status_is_charged(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.execute("anonymous_mapping", 50)
    exactly = tree_usage(os.getpid())[job]
    real = usage._read
    monkeypatch.setattr(usage, "_read", lambda path: None if path.endswith("smaps_rollup") else real(path))
    assert tree_usage(os.getpid())[job].charged == pytest.approx(exactly.charged, abs=MB)


def test_an_old_kernel_tells_one_sum(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.execute("forks_that_share", 60, 3)
    real = usage._kilobyte_fields

    def without_details(content: bytes | None) -> dict[str, int]:
        return {name: value for name, value in real(content).items() if not name.startswith("Pss_")}

    monkeypatch.setattr(usage, "_kilobyte_fields", without_details)
    assert charged_mb() == pytest.approx(60 + 15, abs=12)


def test_outside_linux_the_resident_size_is_charged(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.execute("anonymous_mapping", 50)
    monkeypatch.setattr(usage, "_LINUX", False)
    assert 50 * MB < tree_usage(os.getpid())[job].charged < 80 * MB
    reading = CheapReading(job)
    assert reading.refresh(0.0, 0.1)
    assert 50 * MB < reading.total < 80 * MB
    assert not CheapReading(2**22 - 1).refresh(0.0, 0.1)


class TestCheapReading:
    def test_is_an_upper_bound_without_files(self, jobs: Jobs) -> None:
        job = jobs.execute("shared_mapping", 40)
        reading = CheapReading(job)
        assert reading.refresh(0.0, 0.1)
        exactly = tree_usage(os.getpid())[job]
        assert reading.shared == pytest.approx(exactly.shared, abs=MB)
        assert reading.total == pytest.approx(exactly.charged, abs=MB)
        reading.close()

    def test_notices_shared_memory_at_once_and_the_end(self) -> None:
        memory = mmap.mmap(-1, 20 * MB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        reading = CheapReading(os.getpid())
        assert reading.refresh(0.0, 1e9)
        before = reading.shared
        shapes.touch(memory, 0, 20 * MB)
        assert reading.refresh(0.0, 1e9)
        assert reading.shared - before == pytest.approx(20 * MB, abs=MB)
        reading.close()
        memory.close()

    @pytest.mark.parametrize("kept_open", [0, 64])
    def test_knows_when_the_process_is_gone(self, kept_open: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(usage, "_MAX_KEPT_OPEN", kept_open)
        child = subprocess.Popen(["/bin/sleep", "60"])
        reading = CheapReading(child.pid)
        assert reading.refresh(0.0, 0.1)
        assert reading.total > 0
        child.kill()
        child.wait()
        assert not reading.refresh(1.0, 0.1)
        assert reading.children() == []
        reading.close()

    def test_knows_the_children_of_all_threads(self, jobs: Jobs) -> None:
        job = jobs.execute("children_of_a_thread", 3)
        reading = CheapReading(job)
        assert len(reading.children()) == 4
        assert sorted(reading.children()) == sorted(usage.children(job))
        reading.close()

    def test_knows_many_children(self, jobs: Jobs) -> None:
        job = jobs.execute("children", 25, 0)
        reading = CheapReading(job)
        assert len(reading.children()) == 25
        reading.close()


def test_charged_is_what_both_kinds_come_to() -> None:
    assert ProcessUsage(1, 30, 12, 7).charged == 42
