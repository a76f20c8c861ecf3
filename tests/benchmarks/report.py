"""The report: one markdown file with every table, beside the plots."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.results import Promise, Section, Table

COMMAND = "sh tests/benchmarks/run.sh"
PACKAGES = ["pymongo", "numpy", "pandas", "rq", "celery", "redis"]


def machine() -> str:
    """One line about what the numbers were measured on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    cores = os.cpu_count()
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {cores} cores ({model}), {memory_kb / 2**20:.0f} GB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(directory: Path, name: str, section: Section, *, quick: bool) -> None:
    """Keeps one section's results, in place of an earlier run's."""
    data = _load(directory)
    data[name] = {"machine": machine(), "quick": quick, **section.to_json()}
    (directory / "results.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write(directory: Path, order: list[str]) -> Path:
    """Writes results.md from everything that was measured, and returns its path."""
    data = _load(directory)
    sections = [Section.from_json(data[name]) for name in order if name in data]
    machines = dict.fromkeys(entry["machine"] for entry in data.values())
    lines = ["# Benchmarks", "", f"Written by `{COMMAND}`. " + "; ".join(machines) + ".", ""]
    if any(entry["quick"] for entry in data.values()):
        lines += ["**A quick run: it shows that everything works, its numbers mean little.**", ""]
    promises = [promise for section in sections for promise in section.promises]
    lines += ["## What is promised", "", *markdown(_promises(promises)), ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.about, ""]
        for table in section.tables:
            lines += [*markdown(table), ""]
        lines += [f"![{section.title}]({plot})\n" for plot in section.plots]
    path = directory / "results.md"
    path.write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    return path


def _promises(promises: list[Promise]) -> Table:
    rows = [
        [promise.what, promise.promised, promise.measured, "yes" if promise.kept else "**no**"] for promise in promises
    ]
    return Table(["", "promised", "measured", "kept"], rows)


def markdown(table: Table) -> list[str]:
    """The table, its first column to the left and all others to the right."""
    marks = ["---", *["---:"] * (len(table.columns) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (table.columns, marks, *table.rows)]


def _load(directory: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    path = directory / "results.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
