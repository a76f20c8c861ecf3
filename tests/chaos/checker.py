"""Judges a history: which promises of the supervisor it breaks. Pure: no process, no database.

An attempt lasts from its first record to its last one, whichever of its processes wrote it: what was killed lasted at
least until its last beat. All times are of one clock, so any attempt that says something after the next one has begun
overlaps with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.history import Document, History, Record, story

FINAL = {"completed", "failed", "cancelled"}
OUTCOMES = {"completed", "failure", "loss", "interruption", "return", "cancelled"}
CLOCK_TOLERANCE_SECONDS = 0.05
"""Dates of documents have whole milliseconds, and were converted from another clock."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    invariant: str
    job_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.job_id} {self.what}".strip()


@dataclass(slots=True)
class Verdict:
    """How often each invariant was checked, and what broke it."""

    checked: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.violations

    def judge(self, invariant: str, holds: bool, job_id: str, what: str) -> None:
        self.checked[invariant] += 1
        if not holds:
            self.violations.append(Violation(invariant, job_id, what))


def check(history: History) -> Verdict:
    """Every invariant over the whole history."""
    verdict = Verdict()
    for job_id in history.acknowledged:
        verdict.judge("none lost", job_id in history.documents, job_id, "was acknowledged and has no document")
    for job_id, document in history.documents.items():
        records = sorted(history.records.get(job_id, []), key=lambda record: record.at)
        _check_end(verdict, job_id, document, history)
        _check_story(verdict, job_id, document)
        _check_attempts(verdict, job_id, document, records)
        _check_overlap(verdict, job_id, records)
        _check_after_end(verdict, job_id, document, records)
    unknown = set(history.records) - set(history.documents)
    verdict.judge("none lost", not unknown, "", f"ran and have no document: {sorted(unknown)[:5]}")
    verdict.judge("no process left", not history.leftovers, "", "; ".join(history.leftovers[:10]))
    verdict.judge("supervisors live", not history.exits, "", "; ".join(history.exits[:10]))
    _check_metrics(verdict, history)
    return verdict


def _check_end(verdict: Verdict, job_id: str, document: Document, history: History) -> None:
    status = document["status"]
    verdict.judge("final state", status in FINAL, job_id, f"is {status}: {document.get('lock')}")
    verdict.judge("final state", "lock" not in document, job_id, f"is {status} and has a lock")
    expected = history.expected.get(job_id)
    if expected is not None and status in FINAL:
        facts = {name: document.get(name) for name in ("status", "reason", "error", "failures", "losses", "exit_code")}
        verdict.judge("expected outcome", expected.allowed, job_id, f"({expected.kind}) came to {facts}")


def _check_story(verdict: Verdict, job_id: str, document: Document) -> None:
    """Claims and outcomes alternate, and the counters are what they add up to."""
    moves = story(document)
    claims, outcomes = moves[0::2], moves[1::2]
    in_order = set(claims) <= {"claimed"} and set(outcomes) <= OUTCOMES and len(moves) % 2 == 0
    in_order = in_order and "completed" not in moves[:-1]
    verdict.judge("one outcome per claim", in_order, job_id, f"has the story {' '.join(moves)}")
    if not in_order:
        return
    said = {name: int(document.get(name) or 0) for name in ("attempts", "failures", "interruptions", "losses")}
    returned, lost = outcomes.count("return"), outcomes.count("loss")
    holds = (
        len(claims) - returned <= said["attempts"] <= len(claims)  # a claim that came to no start need not count
        and said["failures"] == outcomes.count("failure")
        and said["interruptions"] == outcomes.count("interruption")
        and said["losses"] <= lost  # nor does the loss of one that waited behind another job
    )
    verdict.judge("counters", holds, job_id, f"says {said}, its story {' '.join(moves)}")


def _check_attempts(verdict: Verdict, job_id: str, document: Document, records: list[Record]) -> None:
    begins = Counter(record.attempt for record in records if record.event == "begin")
    attempts = int(document.get("attempts") or 0)
    twice = [attempt for attempt, count in begins.items() if count > 1]
    verdict.judge("attempts explained", not twice, job_id, f"attempts {twice} began more than once")
    unclaimed = [attempt for attempt in begins if not 1 <= attempt <= attempts]
    verdict.judge("attempts explained", not unclaimed, job_id, f"began {unclaimed}, but was claimed {attempts} times")
    if document["status"] == "completed":
        done = [record.attempt for record in records if record.event == "done"]
        verdict.judge(
            "completed once", attempts in done, job_id, f"is completed by attempt {attempts}, but {done} were done"
        )


def _check_overlap(verdict: Verdict, job_id: str, records: list[Record]) -> None:
    for one, other in overlaps(records):
        what = f"attempt {one.attempt} (process {one.pid}, {one.event}) lived at {one.at:.3f}, "
        what += f"attempt {other.attempt} had begun at {other.at:.3f}"
        verdict.judge("no overlap", False, job_id, what)
    verdict.checked["no overlap"] += 1


def overlaps(records: list[Record]) -> Iterator[tuple[Record, Record]]:
    """For each attempt that outlived the first record of a later one: its last record, and that one."""
    first: dict[int, Record] = {}
    last: dict[int, Record] = {}
    for record in sorted(records, key=lambda record: record.at):
        first.setdefault(record.attempt, record)
        last[record.attempt] = record
    for attempt, end in last.items():
        later = [begin for other, begin in first.items() if other > attempt and begin.at <= end.at]
        if later:
            yield end, min(later, key=lambda begin: begin.at)


def _check_after_end(verdict: Verdict, job_id: str, document: Document, records: list[Record]) -> None:
    if document["status"] not in FINAL or not records:
        return
    last, finished = records[-1], float(document.get("finished_at") or 0)
    late = last.at - finished
    what = (
        f"was {document['status']}, attempt {last.attempt} ({last.event}, process {last.pid}) lived {late:.3f} s later"
    )
    verdict.judge("nothing runs after the end", late <= CLOCK_TOLERANCE_SECONDS, job_id, what)


def _check_metrics(verdict: Verdict, history: History) -> None:
    for status in ("completed", "failed"):
        counted = sum(lifetime.get(status, 0) for lifetime in history.metrics)
        real = sum(document["status"] == status for document in history.documents.values())
        holds = counted == real if history.undisturbed else counted <= real + history.disowned
        what = f"{counted:g} {status} jobs were counted over {len(history.metrics)} lifetimes, there are {real}"
        verdict.judge("metrics", holds, "", what)
