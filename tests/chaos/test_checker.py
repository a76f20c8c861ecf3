"""The checker itself: it lets a good history pass, and finds each broken promise, handmade and real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.history import Expected, History, Record
from tests.chaos.run import Options, run

CLAIMED = "[t] picked up by worker 7 on host"
COMPLETED = "[t] completed (after 1.00 s, exit code 0)"
LOST = "[t] attempt lost: its lease was not renewed"


def good_history() -> History:
    """Job `a` is lost once and then completes; `b` fails."""
    return History(
        documents={
            "a": {
                "status": "completed", "attempts": 2, "losses": 1, "finished_at": 9.01,
                "logs": ["[t] created", CLAIMED, LOST, CLAIMED, COMPLETED],
            },
            "b": {
                "status": "failed", "reason": "exit_code", "attempts": 1, "failures": 1, "finished_at": 3.0,
                "logs": [CLAIMED, "[t] failed: exited with code 3 (after 1.00 s, exit code 3)", "--- STDOUT ---"],
            },
        },
        acknowledged=["a", "b"],
        expected={"a": Expected("long", True), "b": Expected("flaky", True)},
        records={
            "a": [
                Record("begin", 1, 100, 1.0), Record("beat", 1, 101, 2.0),
                Record("begin", 2, 102, 6.0), Record("beat", 2, 103, 8.0), Record("done", 2, 102, 9.0),
            ],
            "b": [Record("begin", 1, 104, 2.0), Record("failed", 1, 104, 2.9)],
        },
        metrics=[{"completed": 1.0}, {"failed": 1.0}],
        undisturbed=True,
    )  # fmt: skip


def test_a_good_history_passes() -> None:
    assert check(good_history()).violations == []


def broken(invariant: str, **changes: Any) -> Any:
    return pytest.param(invariant, changes, id=f"{invariant}-{'-'.join(changes)}".replace(" ", "_"))


@pytest.mark.parametrize(
    ("invariant", "changes"),
    [
        broken("none lost", acknowledged=["a", "b", "c"]),
        broken("none lost", records={"c": [Record("begin", 1, 1, 1.0)]}),
        broken("final state", a={"status": "pending"}),
        broken("final state", a={"lock": {"token": "x"}}),
        broken("expected outcome", expected={"a": Expected("hog", False)}),
        broken("one outcome per claim", a={"logs": [CLAIMED, CLAIMED, COMPLETED]}),
        broken("one outcome per claim", a={"logs": [CLAIMED, COMPLETED, LOST]}),
        broken("one outcome per claim", a={"logs": [CLAIMED, COMPLETED, CLAIMED, COMPLETED]}),
        broken("counters", a={"losses": 2}),
        broken("counters", b={"failures": 0}),
        broken("counters", a={"attempts": 3}),
        broken("attempts explained", b_records=[Record("begin", 2, 9, 2.0)]),
        broken("attempts explained", b_records=[Record("begin", 1, 9, 2.0), Record("begin", 1, 10, 2.5)]),
        broken("completed once", a_records=[Record("begin", 2, 102, 6.0), Record("beat", 2, 103, 8.0)]),
        broken(
            "no overlap",
            a_records=[Record("begin", 1, 1, 1.0), Record("done", 2, 2, 6.0), Record("beat", 1, 3, 6.01)],
        ),
        broken("nothing runs after the end", b_records=[Record("begin", 1, 1, 2.0), Record("beat", 1, 2, 3.1)]),
        broken("no process left", leftovers=["process 1"]),
        broken("supervisors live", exits=["supervisor 0 ended with 1"]),
        broken("metrics", metrics=[{"completed": 2.0, "failed": 1.0}], undisturbed=False),
        broken("metrics", metrics=[{"failed": 1.0}]),
    ],
)
def test_a_broken_promise_is_found(invariant: str, changes: dict[str, Any]) -> None:
    history = good_history()
    for name, value in changes.items():
        if name in history.documents:
            history.documents[name] |= value
        elif name.endswith("_records"):
            history.records[name[0]] = value
        elif isinstance(value, dict):
            getattr(history, name).update(value)
        else:
            setattr(history, name, value)
    assert invariant in {violation.invariant for violation in check(history).violations}


def test_a_history_survives_being_stored(tmp_path: Path) -> None:
    good_history().dump(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == good_history()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "invariants"),
    [
        (Options(bug="claim_without_condition", faults=(), kinds=("short", "long")), {"no overlap"}),
        (
            Options(bug="result_without_token", faults=("cut", "stop_worker"), kinds=("long",)),
            {"one outcome per claim"},
        ),
        (
            Options(bug="reclaim_leaves_process", faults=("kill_runner",), kinds=("forking", "daemonizing")),
            {"no overlap", "no process left"},
        ),
        (Options(bug="no_local_deadline", faults=("stop_keeper",), kinds=("lasting",)), {"no overlap"}),
    ],
    ids=lambda value: value.bug if isinstance(value, Options) else "",
)
def test_a_planted_bug_is_found(options: Options, invariants: set[str]) -> None:
    small = replace(
        options, seed=2, jobs=40, seconds=10, supervisors=3, lease_seconds=2, workers=2, faults_per_second=0.7,
        longest_leases=(2.5,),
    )  # fmt: skip
    found = {violation.invariant for violation in run(small, say=print).verdict.violations}
    assert found & invariants, f"the checker found only {sorted(found)}"
    assert "final state" not in found, "the supervisor did not work at all"
