"""Who is compared: each side runs the same scripts its own way, with the same number of workers.

A side is started with its database ready and empty, warmed up with some jobs, measured, and ended, so that no side
runs while another is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tests.support.running import PYTHON, REPOSITORY
from tests.support.waiting import wait_until


class Side(Protocol):
    """A system that runs scripts as jobs."""

    name: str

    def run(self, script: Path, jobs: int) -> float:
        """Seconds from the start of the first job to the recorded end of the last, all queued at once."""

    def submit(self, script: Path, *arguments: str) -> None:
        """Queues one job now."""

    def pids(self) -> list[int]:
        """The processes of the pool, without the database."""

    def database_pids(self) -> list[int]:
        """The processes of the database or broker."""

    def operations(self) -> int:
        """What the database or broker was asked to do so far."""


StartSide = Callable[[Path, int], contextlib.AbstractContextManager[Side]]
"""Starts a side in an empty directory, with so many workers."""


@contextlib.contextmanager
def program(
    arguments: Sequence[str], *, directory: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Another program in a session of its own; ended with everything that is left of its session."""
    with open(directory / "programs.log", "ab") as log:
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def python_programs(
    count: int, arguments: Sequence[str], *, directory: Path, environment: dict[str, str] | None = None
) -> Iterator[list[int]]:
    """So many of the same; their process ids."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(program([PYTHON, *arguments], directory=directory, environment=environment)).pid
            for _ in range(count)
        ]


def wait_for_all(done: Callable[[], int], jobs: int, *, timeout: float = 600) -> None:
    """Until so many jobs are done. Asks seldom: whoever is asked is being measured."""
    wait_until(lambda: done() >= jobs, timeout=timeout, what=f"{jobs} jobs to be done", pause=0.05)
