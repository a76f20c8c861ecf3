"""A short chaos run of every kind of job and of fault; the long ones are done by hand (README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import report
from tests.chaos.run import Options, run


def test_a_short_run_keeps_every_promise(tmp_path: Path) -> None:
    options = Options(
        seed=7, jobs=200, seconds=25, lease_seconds=3, workers=3, faults_per_second=1.3, keep=tmp_path / "history"
    )
    result = run(options, say=print)
    report(options, result)
    assert result.verdict.violations == []
    assert result.faults.total() > 15
    assert len(result.history.acknowledged) == options.jobs


@pytest.mark.slow
def test_a_neighbour_takes_nothing_over_that_still_runs() -> None:
    """All of a supervisor is killed at once, so that its jobs live on, and the keeper of another one starts anew."""
    options = Options(
        seed=2, jobs=60, seconds=15, lease_seconds=3, workers=3, faults_per_second=1.5,
        faults=("kill_everything", "kill_keeper"), kinds=("forking", "daemonizing"),
    )  # fmt: skip
    result = run(options, say=print)
    report(options, result)
    assert result.verdict.violations == []
    assert result.faults["kill_everything"] > 2
