"""The supervisor's own log: one line per event, with keys that can be searched and counted.

`logger("pool").info("job_finished", job_id=..., attempt=2)` names a fact; how it reads (text or JSON), what
must not be read (credentials) and how often it is repeated are decided here. Each line is one write to
standard error, at most a pipe's atomic size, so that the lines of several processes never mix. A reader that
no longer reads costs lines, never the writer: they are dropped, and the next one that gets through says how
many.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import select
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from supervisor.settings import masked

ROOT = "supervisor"
MAX_LINE_BYTES = 4096
"""PIPE_BUF of Linux: a longer write to a pipe may be torn apart by another process's."""
VALUE_LIMITS = (1500, 300, 60)
"""Characters that one value may have; the next one is tried when the line is too long."""
REPEATS_PER_MINUTE = 10
WRITE_PATIENCE_SECONDS = 0.1

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """The message of a log record: a name and its facts. Reads well under any other handler, too."""

    name: str
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        return _text(self.name, _clean(self.fields, VALUE_LIMITS[0]))


@dataclass(frozen=True, slots=True)
class Logger:
    """Where one part of the program reports its events. A field that is None is left out; `msg` is a sentence
    for a person; an exception as a value becomes its type and message."""

    target: logging.Logger

    def debug(self, event: str, /, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if self.target.isEnabledFor(level):
            self.target.log(level, Event(event, fields))


def logger(name: str) -> Logger:
    """The log of one part of the program, e.g. `pool`."""
    return Logger(logging.getLogger(f"{ROOT}.{name}"))


def configure_logging(format: Format = "text", level: Level = "info", *, descriptor: int = 2) -> None:
    """Sends all events of this process, and warnings of the libraries it uses, to `descriptor`. May be called
    again, e.g. on a reload."""
    handler = EventHandler(descriptor, json_lines=format == "json")
    root = logging.getLogger()
    for former in [former for former in root.handlers if isinstance(former, EventHandler)]:
        root.removeHandler(former)
    root.addHandler(handler)
    logging.getLogger(ROOT).setLevel(level.upper())


class EventHandler(logging.Handler):
    """Limits, renders and writes. `logging` renews its lock in a forked child."""

    def __init__(
        self,
        descriptor: int = 2,
        *,
        json_lines: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._render = _json_line if json_lines else _text_line
        self._limit = RateLimit(monotonic)
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        event = _event_of(record)
        suppressed = 0
        if record.levelno >= logging.WARNING:
            # What happens to one job is a fact of its own, however many jobs it happens to.
            passed = self._limit.pass_on((record.name, event.name, str(event.fields.get("job_id"))))
            if passed is None:
                return
            suppressed = passed
        counts = {"suppressed": suppressed or None, "dropped": self._dropped or None}
        line = self._line(record, Event(event.name, {**event.fields, **counts}))
        if _write(self._descriptor, line, 0 if self._dropped else WRITE_PATIENCE_SECONDS):
            self._dropped = 0
        else:
            self._dropped += 1

    def _line(self, record: logging.LogRecord, event: Event) -> bytes:
        for limit in VALUE_LIMITS:
            line = _encoded(self._render(record, event.name, _clean(event.fields, limit)))
            if len(line) <= MAX_LINE_BYTES:
                return line
        return _encoded(self._render(record, event.name[:200], {"fields": "too long"}))


class RateLimit:
    """Lets `REPEATS_PER_MINUTE` of each key pass in a minute."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._windows: dict[object, tuple[float, int]] = {}
        self._prune_at = 1000

    def pass_on(self, key: object) -> int | None:
        """How many were held back before this one, or None: hold this one back as well."""
        now = self._monotonic()
        if len(self._windows) > self._prune_at:
            self._windows = {key: window for key, window in self._windows.items() if now - window[0] < 60}
            self._prune_at = 2 * len(self._windows) + 1000
        started, count = self._windows.get(key, (now, 0))
        if now - started < 60:
            self._windows[key] = (started, count + 1)
            return None if count >= REPEATS_PER_MINUTE else 0
        self._windows[key] = (now, 1)
        return max(0, count - REPEATS_PER_MINUTE)


def _event_of(record: logging.LogRecord) -> Event:
    """The event of a record, which for those of other libraries is their message."""
    if isinstance(record.msg, Event):
        return record.msg
    trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
    return Event("log", {"msg": record.getMessage(), "traceback": trace})


def _clean(fields: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The fields as plain values without secrets, the sentence first, each of at most `limit` characters."""
    ordered = {"msg": fields.get("msg"), **fields}
    return {name: _value(value, limit) for name, value in ordered.items() if value is not None}


def _value(value: Any, limit: int) -> Any:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple | set | frozenset):
        text = ", ".join(str(_value(item, limit)) for item in value)
    elif isinstance(value, BaseException):
        text = f"{type(value).__name__}: {value}"
    else:
        text = str(value)
    text = masked(text)  # before the cut, which may remove what tells a password
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _text_line(record: logging.LogRecord, name: str, fields: Mapping[str, Any]) -> str:
    return f"{_time(record)} {record.levelname} {_source(record)} {_text(name, fields)}"


def _text(name: str, fields: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={_quoted(value)}" for key, value in fields.items())])


_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\xa0\u2028\u2029]+")


def _quoted(value: Any) -> str:
    """As it is, or as a JSON string where a reader could not tell its end."""
    text = value if isinstance(value, str) else json.dumps(value)
    if _PLAIN.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=False).translate(_UNPRINTABLE)


_UNPRINTABLE = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


def _json_line(record: logging.LogRecord, name: str, fields: Mapping[str, Any]) -> str:
    line = {
        "time": _time(record),
        "level": record.levelname.lower(),
        "logger": _source(record),
        "event": name,
    }
    for key, value in fields.items():
        line[key + "_" if key in line else key] = value
    return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _source(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{ROOT}.")


def _encoded(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _write(descriptor: int, line: bytes, patience_seconds: float) -> bool:
    """Whether the line was written. A full pipe that nobody empties must not stop a supervisor."""
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if not poll.poll(patience_seconds * 1000):
            return False
        os.write(descriptor, line)
    except OSError:
        return False
    return True
