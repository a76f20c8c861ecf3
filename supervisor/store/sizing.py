"""Right-sizing: what scripts declared and what they used, and what they should declare. Pure; `reports` asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEEDED_RUNS = 5
"""Successful runs that a recommendation needs."""
HEADROOM = 1.2
"""A limit kills: what a script used at most, and a fifth more."""
AFTER_KILL = 1.5
"""What a killed run would have needed is unknown: half as much again as the limit that it broke."""
STEP_MB = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished job, in MB."""

    declared: int
    """By its producer."""
    limit: int
    """Of its last attempt: more than it declared where it has grown."""
    peak: int
    """Of its last attempt."""
    completed: bool
    killed: bool
    """Its last attempt was killed for its memory."""
    kills: int
    """How many of its attempts were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptMemory:
    """What the recent runs of one script declared and used, in MB."""

    script: str
    runs: int
    completed: int
    killed: int
    """Attempts that were killed for their memory, those included that growth or another attempt made good."""
    declared: int
    """By the newest run."""
    p50: int
    p95: int
    max: int
    wasted: float
    """Share of the reserved memory that completed runs did not use, 0 to 1."""
    wasted_mb: int
    """What a run like the newest one reserves beyond the recommendation; 0 without one."""
    recommended: int | None
    reason: str


def script_memory(script: str, runs: Sequence[Run]) -> ScriptMemory | None:
    """The summary of a script's runs, newest first; None when there are none."""
    if not runs:
        return None
    peaks = sorted(run.peak for run in runs)
    completed = [run for run in runs if run.completed]
    reserved = sum(run.limit for run in completed)
    used = sum(min(run.peak, run.limit) for run in completed)
    recommended, reason = recommend(runs)
    declared = runs[0].declared
    return ScriptMemory(
        script=script,
        runs=len(runs),
        completed=len(completed),
        killed=sum(run.kills for run in runs),
        declared=declared,
        p50=_percentile(peaks, 0.50),
        p95=_percentile(peaks, 0.95),
        max=peaks[-1],
        wasted=1 - used / reserved if reserved else 0.0,
        wasted_mb=max(0, declared - recommended) if recommended else 0,
        recommended=recommended,
        reason=reason,
    )


def recommend(runs: Sequence[Run]) -> tuple[int | None, str]:
    """What to declare in MB, or None, and why."""
    peaks = [run.peak for run in runs if run.completed]
    broken = max((run.limit for run in runs if run.killed), default=0)
    enough = _step(max(peaks, default=0) * HEADROOM)
    if broken >= enough:
        reason = f"a run was killed at {broken} MB, so that its need is unknown: half as much again"
        return _step(broken * AFTER_KILL), reason
    if len(peaks) < NEEDED_RUNS:
        return None, f"{len(peaks)} successful runs with a measured peak, {NEEDED_RUNS} are needed"
    return enough, f"{len(peaks)} runs used {max(peaks)} MB at most, and {HEADROOM - 1:.0%} more"


def _step(megabytes: float) -> int:
    return max(STEP_MB, math.ceil(megabytes / STEP_MB) * STEP_MB)


def _percentile(ordered: Sequence[int], share: float) -> int:
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
