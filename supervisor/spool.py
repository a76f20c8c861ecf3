"""Results that wait on disk until MongoDB is back: one file for each, complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIX = ".json"


class Spool:
    """A directory of records. Its names sort by nothing in particular: each record is independent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, record: dict[str, Any]) -> None:
        """Stores a record so that it survives a power cut; raises OSError when the disk does not take it."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.directory / f"{name}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.directory / f"{name}{SUFFIX}")
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        with contextlib.suppress(OSError):  # leases are renewed with or without this disk
            return sorted(path.stem for path in self.directory.iterdir() if path.suffix == SUFFIX)
        return []

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Every record with its name; None where the file makes no sense."""
        for name in self.names():
            try:
                with open(self.directory / f"{name}{SUFFIX}", encoding="utf-8") as file:
                    yield name, json.load(file)
            except OSError:  # removed by another keeper, or readable later
                continue
            except ValueError:
                yield name, None

    def remove(self, name: str) -> None:
        (self.directory / f"{name}{SUFFIX}").unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """Keeps a record that cannot be used, out of the way."""
        path = self.directory / f"{name}{SUFFIX}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_suffix(".unreadable"))
