"""How MongoDB is reached: one way to build a client, one way to name its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.errors import BulkWriteError, ConnectionFailure, InvalidURI, OperationFailure, PyMongoError, WTimeoutError
from pymongo.errors import (
    ConfigurationError as DriverConfigurationError,
)

from supervisor.errors import ConfigurationError, StoreUnavailable
from supervisor.settings import masked

Document = dict[str, Any]

_TIMEOUTS = " (configured timeouts: socketTimeoutMS: 10000.0ms, connectTimeoutMS: 10000.0ms)"
_AUTHENTICATION_CODES = {13, 18}
_PASSING_CODES = {
    6, 7, 50, 64, 89, 91, 112, 134, 175, 189, 202, 262, 317, 9001, 10107, 11600, 11602, 13388, 13435, 13436,
}  # fmt: skip
"""Errors of a server that is electing, shutting down or overloaded, or whose indexes change: the same statement
succeeds later."""
_ABOUT_THE_DOCUMENT_CODES = {14, 28, 40, 52, 55, 57, 66, 241, 10334}
_FIRST_ASSERTION_CODE = 14_000
"""From here on codes are those of assertions: an expression of ours could not be evaluated."""


def connect(uri: str, *, app: str, selection_timeout_seconds: float = 30.0) -> MongoClient[Document]:
    """A client whose writes are acknowledged by a majority, and whose dates are aware of UTC. Connects lazily.

    Raises `ConfigurationError` for a connection string that cannot be read.
    """
    if "@" in uri.partition("://")[2].partition("?")[0].partition("/")[2]:
        # The driver would take a part of the password for a host, and say its name.
        raise ConfigurationError("user and password must be percent-encoded (/ is %2F, @ is %40)", setting="MONGO_URI")
    try:
        return MongoClient(
            uri,
            appname=f"mongo-job-supervisor {app}",
            tz_aware=True,
            datetime_conversion="DATETIME_AUTO",  # other programs' dates may be none that Python knows,
            unicode_decode_error_handler="replace",  # and their text none that is UTF-8
            w="majority",
            retryWrites=True,
            retryReads=True,
            readConcernLevel="majority",
            serverSelectionTimeoutMS=round(selection_timeout_seconds * 1000),
            connectTimeoutMS=10_000,
            maxIdleTimeMS=600_000,
        )
    except (InvalidURI, DriverConfigurationError, ValueError, TypeError, OSError) as error:  # OSError: a file of TLS
        raise ConfigurationError(masked(str(error)), setting="MONGO_URI") from None


def is_passing(error: PyMongoError) -> bool:
    """Whether MongoDB is merely away, so that trying again later makes sense."""
    if isinstance(error, ConnectionFailure | WTimeoutError):
        return True
    if isinstance(error, OperationFailure):
        return error.code in _PASSING_CODES or error.has_error_label("RetryableWriteError")
    return False


def is_about_document(error: PyMongoError) -> bool:
    """Whether the server cannot make this very write, now or later. Everything else may be about the server: a full
    disk, a quota, an index that is being changed. Nothing may be given up because of that."""
    if not isinstance(error, OperationFailure) or is_passing(error):
        return False
    code = error.code or 0
    return code in _ABOUT_THE_DOCUMENT_CODES or code > _FIRST_ASSERTION_CODE


def first_failure(error: BulkWriteError, *, ignoring: int | None = None) -> OperationFailure | None:
    """The first reason why a bulk write is not entirely done, other than the code that is ignored."""
    for problem in (*error.details.get("writeErrors", ()), *error.details.get("writeConcernErrors", ())):
        if problem.get("code") != ignoring:
            return OperationFailure(str(problem.get("errmsg")), problem.get("code"))
    return None


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turns the driver's errors into one sentence without secrets."""
    try:
        yield
    except PyMongoError as error:
        raise named(error, uri) from error


def named(error: PyMongoError, uri: str) -> StoreUnavailable:
    where = masked(uri)
    if isinstance(error, OperationFailure) and error.code in _AUTHENTICATION_CODES:
        return StoreUnavailable(f"MongoDB at {where} refuses: {_first_line(error)}")
    if is_passing(error):
        return StoreUnavailable(f"MongoDB at {where} cannot be reached: {_first_line(error)}")
    return StoreUnavailable(f"MongoDB at {where}: {_first_line(error)}")


def _first_line(error: PyMongoError) -> str:
    text = masked(str(error)).splitlines()[0] if str(error) else type(error).__name__
    return text.split(", Timeout:")[0].split(", full error:")[0].replace(_TIMEOUTS, "")
