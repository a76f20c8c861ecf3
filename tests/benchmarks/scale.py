"""How much of everything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Scale:
    """`quick` shows that everything works; its numbers mean little."""

    quick: bool
    directory: Path
    """For everything that is written during the run."""
    plots: Path
    """For the PNG files."""

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def fresh(self, name: str) -> Path:
        """A new directory for one step."""
        number = len(list(self.directory.iterdir()))
        path = self.directory / f"{number}-{name}"
        path.mkdir()
        return path
