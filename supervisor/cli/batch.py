"""Jobs from a file: JSON Lines or CSV, line by line, each checked before anything is sent.

Memory does not grow with the file, and a line that is wrong is named with its number and its field, whatever it holds.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from supervisor.errors import InvalidJob, UsageError

Format = Literal["jsonl", "csv"]
Advance = Callable[[int], None]

MAX_LINE_BYTES = 15 * 2**20
"""A line above this cannot become a document: MongoDB's limit is 16 MB."""

_WHOLE = {"required_memory", "priority", "max_attempts", "max_memory"}
_FRACTIONS = {"timeout", "retry_delay", "memory_growth"}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Record:
    """The fields that one line describes, or why it describes none."""

    line: int
    fields: dict[str, Any]
    error: InvalidJob | None = None


def format_of(name: str, chosen: str | None) -> Format:
    """The format of a file, by its name; raises `UsageError` when that does not tell."""
    if chosen is not None:
        return "csv" if chosen == "csv" else "jsonl"
    suffix = Path(name).suffix.lower()
    if suffix == ".csv":
        return "csv"
    if suffix in (".jsonl", ".ndjson", ".json") or name == "-":
        return "jsonl"
    raise UsageError(f"{name}: neither .jsonl nor .csv: say which with --format")


@contextmanager
def opened(name: str, stdin: IO[bytes], *, twice: bool) -> Iterator[IO[bytes]]:
    """The file, or standard input for `-`; `twice`: so that it can be read again from its beginning."""
    if name != "-":
        try:
            file = open(name, "rb")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from None
        with file:
            yield file
    elif not twice:
        yield stdin
    else:
        with tempfile.TemporaryFile() as copy:
            while block := stdin.read(2**20):
                copy.write(block)
            copy.seek(0)
            yield copy


def records(file: IO[bytes], kind: Format, advance: Advance = lambda amount: None) -> Iterator[Record]:
    """What each line describes, in order; blank lines are left out. `advance` is told the bytes that were read."""
    return _csv_records(file, advance) if kind == "csv" else _json_records(file, advance)


def _lines(file: IO[bytes], advance: Advance) -> Iterator[bytes]:
    for number, line in enumerate(file, start=1):
        advance(len(line))
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_records(file: IO[bytes], advance: Advance) -> Iterator[Record]:
    for number, line in enumerate(_lines(file, advance), start=1):
        if not line.strip():
            continue
        try:
            yield Record(number, _from_json(line))
        except InvalidJob as error:
            yield Record(number, {}, error)


def _from_json(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidJob("document", f"is {len(line):,} bytes long, the limit is {MAX_LINE_BYTES:,}")
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise InvalidJob("document", "is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidJob("document", f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidJob("document", "is not a JSON object")
    return converted(value)


def _csv_records(file: IO[bytes], advance: Advance) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # A byte that is no UTF-8 becomes a lone surrogate, which the door refuses with the name of the field.
    rows = csv.reader(line.decode("utf-8", "surrogateescape") for line in _lines(file, advance))
    header: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Record(rows.line_num, {}, InvalidJob("document", f"is not CSV: {error}"))
            continue
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            continue
        try:
            yield Record(rows.line_num, _from_row(header, row))
        except InvalidJob as error:
            yield Record(rows.line_num, {}, error)


def _from_row(header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) > len(header):
        raise InvalidJob("document", f"has {len(row)} columns, the header has {len(header)}")
    cells = {name: cell for name, cell in zip(header, row, strict=False) if cell != ""}
    return converted({name: _from_cell(name, cell) for name, cell in cells.items()})


def _from_cell(name: str, cell: str) -> Any:
    text = cell.strip()
    try:
        if name in _WHOLE:
            return int(text)
        if name in _FRACTIONS:
            return float(text)
    except ValueError:
        raise InvalidJob(name, f"must be a number, not {cell!r}") from None
    if name == "python_args":
        return _arguments(text)
    if name == "env":
        return _environment(text)
    if name == "tags":
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    if name == "memory_warning":
        if text.lower() not in _TRUTH:
            raise InvalidJob(name, f"must be true or false, not {cell!r}")
        return _TRUTH[text.lower()]
    return cell


def _arguments(text: str) -> Any:
    """A JSON array, or words as a shell reads them."""
    try:
        return json.loads(text) if text.startswith("[") else shlex.split(text)
    except ValueError as error:
        raise InvalidJob("python_args", f"neither a JSON array nor words for a shell: {error}") from None


def _environment(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidJob("env", f"is not a JSON object: {error}") from None


def converted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a job has them: dates read, the script's path absolute, its name the default for the job's."""
    result = dict(fields)
    date = result.get("scheduled_date")
    if isinstance(date, str):
        result["scheduled_date"] = _date(date)
    path = result.get("python_path")
    if isinstance(path, str) and path:
        result["python_path"] = os.path.abspath(path)
        if result.get("request_name") is None:
            result["request_name"] = os.path.basename(path)
    elif path is None:
        raise InvalidJob("python_path", "is missing")
    return result


def _date(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InvalidJob("scheduled_date", f"{text!r} is not an ISO 8601 time") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
