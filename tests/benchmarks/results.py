"""What a benchmark hands to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the report, ready to be printed."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Promise:
    """What an issue or the README promises, and what was measured."""

    what: str
    promised: str
    measured: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's part of the report. `plots` are the names of its PNG files."""

    title: str
    about: str
    tables: list[Table]
    plots: list[str] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            title=data["title"],
            about=data["about"],
            tables=[Table(**table) for table in data["tables"]],
            plots=data["plots"],
            promises=[Promise(**promise) for promise in data["promises"]],
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the others does not exceed; the highest one for a high share of few values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, and how far it may be trusted."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
