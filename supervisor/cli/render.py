"""How answers look: tables, sizes, times, progress.

Text that jobs and producers wrote never reaches a terminal with its control characters. Colour and box drawing only
on a terminal, no colour with NO_COLOR; elsewhere plain aligned columns, never cut. rich is loaded when it is needed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

STATUS_STYLES = {
    "pending": "yellow",
    "running": "cyan",
    "completed": "green",
    "failed": "bold red",
    "cancelled": "dim",
    "OK": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
}
LEAST_WIDTH = 10
"""What a column that may be cut keeps, in characters."""
GAP = 2
Advance = Callable[[int], None]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# -- machines ---------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value of a document as JSON can say it: ids as text, dates as ISO 8601 in UTC."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    return str(value)


def plain_job(document: Mapping[str, Any]) -> dict[str, Any]:
    """A job's document for JSON, its `_id` as `id`."""
    fields = plain(document)
    return {"id": fields.pop("_id", None), **fields}


def print_json(value: Any) -> None:
    """One JSON document on one line."""
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False), flush=True)


# -- words ------------------------------------------------------------------------------------------------------------


def printable(text: Any, *, keep_lines: bool = False) -> str:
    """The text without anything that moves the cursor or changes the terminal."""
    pattern = _CONTROL_BUT_LINES if keep_lines else _CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC, to the second, or to the millisecond where it has a fraction."""
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds").replace("+00:00", "Z")


def when(moment: Any) -> str:
    """A time for people: UTC, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if isinstance(moment, datetime) else "-"


def span(seconds: float) -> str:
    """A length of time in its two largest units: `850 ms`, `3.2 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 0.9995:
        return f"{max(0, round(seconds * 1000))} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            whole = round(whole / smaller) * smaller
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    raise AssertionError(seconds)


def size(megabytes: float) -> str:
    """Memory for people: `512 MB`, `1.5 GB`."""
    if megabytes < 1024:
        return f"{megabytes:.0f} MB"
    return f"{megabytes / 1024:.1f}".removesuffix(".0") + " GB"


def byte_size(count: int) -> str:
    """Bytes for people: `17 bytes`, `12 KB`, `3.4 MB`."""
    if count < 1024:
        return f"{count} byte{'' if count == 1 else 's'}"
    if count < 1024 * 1024:
        return f"{count / 1024:.0f} KB"
    megabytes = count / 1024 / 1024
    return f"{megabytes:.0f} MB" if megabytes >= 10 else f"{megabytes:.1f} MB"


def counted(count: int, noun: str) -> str:
    """`1 job`, `2 jobs`, `1,000 jobs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def bar(parts: Sequence[tuple[float, str]], whole: float, width: int = 40) -> str:
    """A bar of `width` cells: each part takes its share of `whole` with its character, dots fill the rest."""
    cells = ""
    reached = 0.0
    for amount, character in parts:
        reached = max(reached, amount)
        cells += character * (round(width * min(1.0, reached / whole)) - len(cells)) if whole > 0 else ""
    return cells.ljust(width, ".")


# -- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, and how it is laid out."""

    heading: str
    align: Literal["left", "right"] = "left"
    keep: bool = False
    """Never cut, however narrow the terminal."""
    spare: int = 0
    """Where a terminal is too narrow, columns are left out: the highest number first, those with 0 never."""


def on_terminal(stream: TextIO | None = None) -> bool:
    stream = stream or sys.stdout
    return stream is not None and stream.isatty()


def table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Rows under headings: fitted to a terminal, or plain aligned text that is never cut."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if on_terminal():
        _rich_table(columns, cells)
        return
    widths = [max(len(line[at]) for line in [[c.heading for c in columns], *cells]) for at in range(len(columns))]
    for line in [[column.heading for column in columns], *cells]:
        padded = [
            text.rjust(width) if column.align == "right" else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _rich_table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    widest = [max([len(each.heading), *(len(row[at]) for row in cells)]) for at, each in enumerate(columns)]
    drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    widths = fitted(columns, widest, console.width)
    for at, width in widths.items():
        heading, align = columns[at].heading, columns[at].align
        drawn.add_column(heading, justify=align, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        drawn.add_row(*(Text(row[at], style=STATUS_STYLES.get(row[at], "")) for at in widths))
    console.print(drawn)


def fitted(columns: Sequence[Column], widest: Sequence[int], room: int) -> dict[int, int]:
    """The columns (by position) that `room` characters have room for, and how wide each is."""
    least = [width if column.keep else min(width, LEAST_WIDTH) for column, width in zip(columns, widest, strict=True)]
    shown = list(range(len(columns)))
    for at in sorted(shown, key=lambda at: -columns[at].spare):
        if sum(least[each] + GAP for each in shown) <= room or not columns[at].spare:
            break
        shown.remove(at)
    left = max(0, room - sum(least[each] + GAP for each in shown))
    widths = {}
    for at in shown:  # what is left goes to those that were cut, from left to right
        more = min(widest[at] - least[at], left)
        widths[at] = least[at] + more
        left -= more
    return widths


def line(text: str, style: str = "") -> None:
    """One line, styled on a terminal."""
    if not (style and on_terminal()):
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False, soft_wrap=True).print(Text(text, style=style))


# -- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def progress(title: str, total: int | None, unit: Literal["bytes", "jobs"]) -> Iterator[Advance]:
    """A progress bar on stderr if that is a terminal; yields the function that moves it on."""
    if not on_terminal(sys.stderr):
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount_column = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), amount_column, TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    ) as shown:  # fmt: skip
        task = shown.add_task(title, total=total)
        yield lambda amount: shown.advance(task, amount)
