"""`jobs memory`: what each script declares and uses, and what it should declare."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from supervisor.cli import render
from supervisor.cli.main import complain
from supervisor.cli.render import Column

if TYPE_CHECKING:
    from supervisor.manager import JobManager


def memory(manager: JobManager, options: argparse.Namespace) -> int:
    """Right-sizing per script, the most wasteful first."""
    found = manager.reports.memory_by_script(containing=options.script)[: options.limit]
    if options.json:
        for script in found:
            render.print_json(asdict(script))
        return 0
    if not found:
        complain("no finished job has a measured peak yet", word="note")
        return 0
    columns = [
        Column("SCRIPT"), Column("RUNS", "right", keep=True, spare=4), Column("KILLED", "right", keep=True, spare=3),
        Column("DECLARED", "right", keep=True), Column("P50", "right", keep=True, spare=6),
        Column("P95", "right", keep=True, spare=5), Column("MAX", "right", keep=True),
        Column("WASTED", "right", keep=True, spare=2), Column("DECLARE", "right", keep=True),
        Column("BECAUSE", spare=1),
    ]  # fmt: skip
    rows = [
        [
            each.script, f"{each.runs:,}", each.killed, each.declared, each.p50, each.p95, each.max,
            f"{each.wasted:.0%}", each.recommended or "-", each.reason,
        ]
        for each in found
    ]  # fmt: skip
    render.table(columns, rows)
    if render.on_terminal():
        print("Memory in MB. DECLARE is the required_memory to give; producer submit --memory auto uses it.")
    return 0
