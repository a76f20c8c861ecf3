"""Jobs from a file: JSON Lines or CSV, line by line, each checked before anything is sent.

Memory does not grow with the file, and a line that is wrong is named with its number and its field, whatever it holds.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

from supervisor.errors import InvalidJob, UsageError
from supervisor.states import Status

Format = Literal["jsonl", "csv"]
Advance = Callable[[int], None]

MAX_LINE_BYTES = 15 * 2**20
"""A line above this cannot become a document: MongoDB's limit is 16 MB."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE = {"required_memory", "priority", "max_attempts", "max_memory"}
_FRACTIONS = {"timeout", "retry_delay", "memory_growth"}
_DATES = ("scheduled_date", "created_at")
WRITTEN = frozenset({
    "attempts", "failures", "interruptions", "losses", "started_at", "finished_at", "duration_seconds", "exit_code",
    "reason", "error", "peak_memory", "memory_samples", "memory_kills", "declared_memory", "cancel_requested", "lock",
})  # fmt: skip
"""What supervisors write: a document that was exported has it, and an imported job begins without."""
_LEFT_OUT = WRITTEN | {"_id", "id", "updated_at", "logs", "status"}
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
def opened(name: str, *, twice: bool) -> Iterator[IO[bytes]]:
    """The file, or standard input for `-`; `twice`: so that it can be read again from its beginning."""
    with _source(name) as file:
        if not twice or (name != "-" and file.seekable()):  # standard input may have been read from already
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(file, copy)
            except OSError as error:
                raise UsageError(f"{name}: {error.strerror}") from None
            copy.seek(0)
            yield copy


@contextmanager
def _source(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    with file:
        yield file


def size_of(file: IO[bytes]) -> int | None:
    """The bytes of a file, None where they cannot be known ahead: of a pipe."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def records(file: IO[bytes], kind: Format, advance: Advance = lambda amount: None) -> Iterator[Record]:
    """What each line describes, in order; blank lines are left out. `advance` is told the bytes that were read."""
    number = 0
    try:
        for record in _csv_records(file, advance) if kind == "csv" else _json_records(file, advance):
            number = record.line
            yield record
    except OSError as error:
        yield Record(number + 1, {}, InvalidJob("document", f"cannot be read: {error.strerror}"))


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
            twice = [name for name in header if name and header.count(name) > 1]
            if twice:
                raise UsageError(f"line {rows.line_num}: the column {twice[0]!r} is there more than once")
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
    except (ValueError, RecursionError) as error:
        raise InvalidJob("python_args", f"neither a JSON array nor words for a shell: {error}") from None


def _environment(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidJob("env", f"is not a JSON object: {error}") from None


def converted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a new job has them: dates read, the script's path absolute, its name the default for the job's."""
    if fields.get("status") not in (None, Status.PENDING):
        raise InvalidJob("status", f"is {fields['status']!r}: only a pending job can be imported")
    result = {name: _value(name, value) for name, value in fields.items() if name not in _LEFT_OUT}
    for name in _DATES:
        if isinstance(result.get(name), str):
            result[name] = _date(name, result[name])
    if not isinstance(result.get("created_at"), datetime | None):
        raise InvalidJob("created_at", f"{result['created_at']!r:.60} is not an ISO 8601 time")
    path = result.get("python_path")
    if isinstance(path, str) and path:
        result["python_path"] = os.path.abspath(path)
        if result.get("request_name") is None:
            result["request_name"] = os.path.basename(path)
    elif path is None:
        raise InvalidJob("python_path", "is missing")
    return result


def _value(field: str, value: Any) -> Any:
    """A value as JSON has it, also of MongoDB's Extended JSON, which mongoexport writes."""
    if isinstance(value, list):
        return [_value(field, each) if isinstance(each, dict) else each for each in value]
    if not isinstance(value, dict) or len(value) != 1 or field == "env":
        return value
    (kind, inner), = value.items()  # fmt: skip
    try:
        match kind:
            case "$date":
                if isinstance(inner, str):
                    return _date(field, inner)
                since_epoch = int(inner["$numberLong"]) if isinstance(inner, dict) else inner
                return _EPOCH + timedelta(milliseconds=since_epoch)
            case "$numberInt" | "$numberLong":
                return int(inner)
            case "$numberDouble":
                return float(inner)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise InvalidJob(field, f"{value!r:.60} is no value of MongoDB's Extended JSON") from None
    return value


def _date(field: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise InvalidJob(field, f"{text!r} is outside the years 1 to 9999 in UTC") from None
    except ValueError:
        raise InvalidJob(field, f"{text!r:.60} is not an ISO 8601 time") from None
