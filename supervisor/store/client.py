"""How MongoDB is reached: one way to build a client, one way to name its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.errors import (
    ConfigurationError as DriverConfigurationError,
)
from pymongo.errors import ConnectionFailure, InvalidURI, OperationFailure, PyMongoError, WTimeoutError

from supervisor.errors import ConfigurationError, StoreUnavailable
from supervisor.settings import masked

Document = dict[str, Any]

_TIMEOUTS = " (configured timeouts: socketTimeoutMS: 10000.0ms, connectTimeoutMS: 10000.0ms)"
_AUTHENTICATION_CODES = {13, 18}
_PASSING_CODES = {6, 7, 64, 89, 91, 112, 189, 202, 262, 9001, 10107, 11600, 11602, 13388, 13435, 13436, 50, 134, 317}
"""Errors of a server that is electing, shutting down or overloaded: the same statement succeeds later."""


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
