"""What a run left behind, as plain data that a checker can judge, store and load."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

Document = dict[str, Any]


class Record(NamedTuple):
    """What a process of an attempt said: `begin`, `beat`, `failed`, `done`; seconds since boot."""

    event: str
    attempt: int
    pid: int
    at: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What the workload says of one job, reduced to what a checker needs."""

    kind: str
    allowed: bool
    """Whether the final document is an outcome that this job may have."""


@dataclass(slots=True)
class History:
    """A whole run."""

    documents: dict[str, Document] = field(default_factory=dict)
    acknowledged: list[str] = field(default_factory=list)
    expected: dict[str, Expected] = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    """Processes that lived on when every supervisor was gone."""
    exits: list[str] = field(default_factory=list)
    """Supervisors that ended without being asked to, or not with 0."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """For each supervisor that was started: its last seen `jobs_finished_total` by status."""
    disowned: int = 0
    """Results that a metric had counted when they turned out to be too late."""
    undisturbed: bool = False
    """No fault was done, so that the metrics must be exact."""

    def dump(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str, indent=1), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        data = json.loads(path.read_text("utf-8"))
        data["records"] = {job: [Record(*record) for record in records] for job, records in data["records"].items()}
        data["expected"] = {job: Expected(**expected) for job, expected in data["expected"].items()}
        return cls(**data)


def read_records(directory: Path) -> dict[str, list[Record]]:
    """By job id, in the order in which they were written."""
    found: dict[str, list[Record]] = defaultdict(list)
    for path in directory.iterdir():
        for line in path.read_text("ascii").splitlines():
            event, attempt, pid, at = line.split()
            found[path.name].append(Record(event, int(attempt), int(pid), float(at)))
    return dict(found)


def plain(document: Document, boot_offset: float) -> Document:
    """A document with its dates as seconds since boot, as the records have them."""

    def convert(value: Any) -> Any:
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() - boot_offset
        if isinstance(value, dict):
            return {name: convert(each) for name, each in value.items()}
        return value

    return {name: convert(value) for name, value in document.items() if name not in ("_id", "memory_samples")}


_STORY = [
    ("claimed", r"picked up by worker"),
    ("completed", r"completed \("),
    ("failure", r"attempt failed \(|failed: (?!lost)"),
    ("loss", r"attempt lost: |lost \(|failed: lost "),
    ("interruption", r"interrupted\b"),
    ("return", r"handed back before"),
    ("cancelled", r"cancelled"),
]
_PATTERNS = [(name, re.compile(rf"\[[^\]]*\] (?:{pattern})")) for name, pattern in _STORY]


def story(document: Document) -> list[str]:
    """The moves of a job in order, from the lines that every move adds to `logs` in the same write."""
    moves = []
    for line in document.get("logs", []):
        moves += [name for name, pattern in _PATTERNS if pattern.match(str(line))]
    return moves
