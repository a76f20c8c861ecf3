"""Fixtures for every test: a real MongoDB, a database of the test's own, and a real supervisor on it."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from pymongo import MongoClient

from supervisor import JobManager
from tests.support.alone import run_alone
from tests.support.mongod import MongoServer
from tests.support.running import Jobs, RunningSupervisor, running_supervisor


def pytest_configure() -> None:
    """Tests send these: a run that was started in the background, or with nohup, ignores them."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


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
    yield from _database(mongo_server)


def _database(server: MongoServer) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    server.start()
    with MongoClient[dict[str, object]](server.uri) as client:
        client.drop_database(name)


# -- jobs and supervisors of one test -------------------------------------------------------------------------------


@pytest.fixture
def manager(mongo_uri: str, db_name: str) -> Iterator[JobManager]:
    """The public API on the test's database."""
    with JobManager(mongo_uri, db_name) as manager:
        yield manager


@pytest.fixture
def jobs(tmp_path: Path, manager: JobManager) -> Jobs:
    """The jobs of this test."""
    return Jobs(tmp_path, manager)


Start = Callable[..., RunningSupervisor]


@pytest.fixture
def start_supervisor(tmp_path: Path, mongo_uri: str, db_name: str) -> Iterator[Start]:
    """Starts a supervisor with these settings; all are ended afterwards, and leave no process behind."""
    with ExitStack() as running:

        def start(**settings: object) -> RunningSupervisor:
            return running.enter_context(running_supervisor(tmp_path, mongo_uri, db_name, **settings))

        yield start


@pytest.fixture
def supervisor(start_supervisor: Start) -> RunningSupervisor:
    """A supervisor with two workers, of this test alone."""
    return start_supervisor()


# -- for tests that do not disturb each other -----------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A supervisor with two workers for a whole module, and jobs on it."""

    supervisor: RunningSupervisor
    jobs: Jobs


@pytest.fixture(scope="module")
def shared(mongo_server: MongoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    mongo_server.start()
    directory = tmp_path_factory.mktemp("shared")
    for name in _database(mongo_server):
        with (
            JobManager(mongo_server.uri, name) as manager,
            running_supervisor(directory, mongo_server.uri, name) as supervisor,
        ):
            yield Shared(supervisor, Jobs(directory, manager))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tests that are marked `alone` get a process of their own."""
    if item.get_closest_marker("alone") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in run_alone(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)  # of earlier tests, which ran here
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
