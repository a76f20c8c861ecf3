"""How command lines are read: a parser whose errors are one line, and the types that several commands share.

Standard library only: loaded before anything is known to be needed.
"""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from typing import Any, NoReturn

from supervisor.errors import UsageError
from supervisor.states import Reason, Status

_UNIT_SECONDS = {
    "": 1.0,
    "ms": 0.001,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|[smhdw]|)", re.IGNORECASE)

MAX_WHOLE = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` with one clear line instead of printing its usage and leaving."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # a script must not break when an option is added
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


def duration(text: str) -> float:
    """Seconds from `90s`, `5m`, `2h`, `1h30m`, `250ms`, `2d`, or a plain number of seconds."""
    parts = _DURATION.findall(text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 5m, 2h, 1h30m or 45")
    return sum(float(number) * _UNIT_SECONDS[unit.lower()] for number, unit in parts)


def utc_time(text: str) -> datetime:
    """A time from ISO 8601; one without a time zone is UTC."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text!r} is outside the years 1 to 9999 in UTC") from None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an ISO 8601 time such as 2030-01-31T18:00:00Z (all times are UTC)"
        ) from None


def moment_or_age(text: str) -> datetime:
    """A time in UTC, or how long ago it was: `2h` is two hours ago."""
    from datetime import timedelta

    try:
        return datetime.now(UTC) - timedelta(seconds=duration(text))
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text!r} is too long ago") from None
    except argparse.ArgumentTypeError:
        return utc_time(text)


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= MAX_WHOLE:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number from 1 to {MAX_WHOLE}")
    return int(text)


def unicode_text(text: str) -> str:
    """Text that a database can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return text


def some_text(text: str) -> str:
    """Text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return unicode_text(text)


def variable(text: str) -> tuple[str, str]:
    """An environment variable from `NAME=VALUE`."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def statuses(text: str) -> list[str]:
    """Statuses from a comma-separated list."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in set(Status):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(Status)}")
    if not names:
        raise argparse.ArgumentTypeError(f"names none of {', '.join(Status)}")
    return names


def add_json(parser: argparse.ArgumentParser, meaning: str) -> None:
    """`--json`. The parser of all commands sets the default: that of a command would undo what stands before it."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=f"for machines: {meaning}")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """The options that choose jobs."""
    chosen = parser.add_argument_group("which jobs")
    chosen.add_argument(
        "--status", action="extend", type=statuses, default=[], metavar="STATUS[,…]",
        help=f"one or more of {', '.join(Status)}; may be repeated",
    )  # fmt: skip
    chosen.add_argument("--queue", type=unicode_text, help="of this queue")
    chosen.add_argument("--tag", type=unicode_text, help="with this tag")
    chosen.add_argument("--reason", choices=[reason.value for reason in Reason], help="that ended for this reason")
    chosen.add_argument("--name", type=unicode_text, metavar="TEXT", help="whose name contains this text, in any case")
    chosen.add_argument("--script", type=unicode_text, metavar="TEXT", help="whose script's path contains this text")
    chosen.add_argument(
        "--since",
        type=moment_or_age,
        metavar="TIME",
        help="created then or later: an ISO time in UTC, or an age (2h)",
    )
    chosen.add_argument("--until", type=moment_or_age, metavar="TIME", help="created before: the same forms")
