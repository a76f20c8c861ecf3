"""Fixtures for every test: a real MongoDB, and a database of the test's own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from pymongo import MongoClient

from tests.support.mongod import MongoServer


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[MongoServer]:
    """A MongoDB for the whole run. A test may stop, pause or kill it: the next one finds it running."""
    with MongoServer() as server:
        yield server


@pytest.fixture
def mongo_uri(mongo_server: MongoServer) -> str:
    """The address of a running MongoDB."""
    mongo_server.start()
    return mongo_server.uri


@pytest.fixture
def db_name(mongo_server: MongoServer, mongo_uri: str) -> Iterator[str]:
    """The name of a database that is empty, and dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    mongo_server.start()
    with MongoClient[dict[str, object]](mongo_uri) as client:
        client.drop_database(name)
