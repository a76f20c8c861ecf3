"""What scripts should declare."""

from __future__ import annotations

import pytest

from supervisor.store.sizing import Run, recommend, script_memory


def run(
    peak: int, declared: int = 256, *, completed: bool = True, killed: bool = False, limit: int = 0, kills: int = 0
) -> Run:
    kills = kills or int(killed)
    return Run(declared=declared, limit=limit or declared, peak=peak, completed=completed, killed=killed, kills=kills)


@pytest.mark.parametrize(
    ("runs", "recommended", "words"),
    [
        ([run(80)] * 4, None, "4 successful runs"),
        ([run(80)] * 5, 96, "5 runs used 80 MB at most"),
        ([run(81)] * 5, 112, "81 MB at most"),
        ([run(1)] * 5, 16, "1 MB at most"),
        ([run(60, 64, completed=False)] * 50, None, "0 successful runs"),
        ([run(80)] * 5 + [run(97, 96, completed=False, killed=True)], 144, "killed at 96 MB"),
        ([run(200)] * 5 + [run(97, 96, completed=False, killed=True)], 240, "200 MB at most"),
        ([run(65, 64, completed=False, killed=True)], 96, "killed at 64 MB"),
        ([run(200, 64, limit=256, kills=2)] * 5, 240, "200 MB at most"),
        ([run(257, 64, limit=256, kills=3, completed=False, killed=True)], 384, "killed at 256 MB"),
    ],
)
def test_recommends_what_does_not_kill(runs: list[Run], recommended: int | None, words: str) -> None:
    value, reason = recommend(runs)
    assert value == recommended
    assert words in reason


def test_summarises_the_runs_of_a_script() -> None:
    runs = [run(peak, 200) for peak in range(1, 101)]
    summary = script_memory("a.py", runs)
    assert summary is not None
    assert (summary.p50, summary.p95, summary.max) == (50, 95, 100)
    assert (summary.declared, summary.recommended, summary.wasted_mb) == (200, 128, 72)
    assert summary.wasted == pytest.approx(1 - 50.5 / 200)


def test_growth_does_not_hide_what_was_declared_and_killed() -> None:
    summary = script_memory("a.py", [run(200, 64, limit=256, kills=2)] * 5)
    assert summary is not None
    assert (summary.declared, summary.killed, summary.recommended, summary.wasted_mb) == (64, 10, 240, 0)
    assert summary.wasted == pytest.approx(1 - 200 / 256)


def test_says_nothing_about_a_script_without_runs() -> None:
    assert script_memory("a.py", []) is None
