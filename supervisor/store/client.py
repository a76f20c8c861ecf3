"""How MongoDB is reached: one way to build a client, one way to name its errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.errors import BulkWriteError, ConnectionFailure, InvalidURI, OperationFailure, PyMongoError, WTimeoutError
from pymongo.errors import (
    ConfigurationError as DriverConfigurationError,
)
from pymongo.uri_parser import split_options

from supervisor.errors import ConfigurationError, StoreUnavailable
from supervisor.settings import masked

Document = dict[str, Any]

_TIMEOUTS = " (configured timeouts: socketTimeoutMS: 10000.0ms, connectTimeoutMS: 10000.0ms)"
_MUST_BE_ENCODED = "user and password must be percent-encoded (/ is %2F, ? is %3F, @ is %40)"
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
    """A client whose writes are acknowledged by a majority, and whose dates are aware of UTC. It has threads at once;
    nobody waits for the connection.

    Raises `ConfigurationError` for a connection string that cannot be read, and `StoreUnavailable` where the name of
    a `mongodb+srv://` one cannot be resolved.
    """
    if "@" in uri.partition("://")[2].partition("?")[0].partition("/")[2]:
        # The driver would take a part of the password for a host, and say its name.
        raise ConfigurationError(_MUST_BE_ENCODED, setting="MONGO_URI")
    try:
        _check_options(uri)
        return _client(uri, app, selection_timeout_seconds)
    except (InvalidURI, DriverConfigurationError, ValueError, TypeError, OSError) as error:  # OSError: a file of TLS
        if _is_about_names(error):
            raise StoreUnavailable(f"MongoDB at {masked(uri)} cannot be reached: {masked(str(error))}") from error
        raise ConfigurationError(masked(str(error)), setting="MONGO_URI") from None


def _client(uri: str, app: str, selection_timeout_seconds: float) -> MongoClient[Document]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about options: `_check_options` has raised what matters
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
            # Streaming costs a connection and a thread that wakes twice a second in every worker; an operation that
            # fails looks for the new primary anyway.
            serverMonitoringMode="poll",
        )


def _check_options(uri: str) -> None:
    """Raises `ConfigurationError` for an option that the driver would ignore, with a warning on stderr."""
    options = uri.partition("?")[2]
    for option in re.split("[&;]", options):
        if problem := _problem_of(option):
            if "@" in options:  # what looks like an option is a part of the password
                raise ConfigurationError(_MUST_BE_ENCODED, setting="MONGO_URI")
            raise ConfigurationError(masked(f"option {option.partition('=')[0]}: {problem}"), setting="MONGO_URI")
    if problem := _problem_of(options):  # such as one that is there twice
        raise ConfigurationError(masked(problem), setting="MONGO_URI")


def _problem_of(options: str) -> str | None:
    if not options:
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            split_options(options, validate=True, warn=False)
        except (InvalidURI, DriverConfigurationError, ValueError, TypeError) as error:
            return "there is no such option" if str(error).startswith("Unknown option") else str(error)
    found = [str(each.message) for each in said if issubclass(each.category, UserWarning)]
    # A compressor that is not installed is a wish that the driver does without.
    return next((text for text in found if not ("compression" in text and "not available" in text)), None)


def _is_about_names(error: Exception) -> bool:
    """Whether the driver, which says `ConfigurationError`, got no answer from DNS, or the answer that there is none."""
    from dns.exception import DNSException, FormError, SyntaxError

    cause = error.__cause__ or error.__context__
    return isinstance(cause, DNSException) and not isinstance(cause, FormError | SyntaxError)


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
