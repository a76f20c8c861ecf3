"""The two sides whose jobs are documents in MongoDB: the supervisor and the plain polling worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.collection import Collection

from supervisor.manager import JobManager, new_document
from tests.benchmarks.resources import tree
from tests.benchmarks.sides import Side, StartSide, python_programs, wait_for_all
from tests.support.mongod import MongoServer
from tests.support.running import running_supervisor

DATABASE = "benchmark"
BASELINE_POLL_SECONDS = 1.0
Document = dict[str, Any]


class MongoSide:
    """Jobs in a collection, whoever runs them."""

    def __init__(self, name: str, server: MongoServer, client: MongoClient[Document], roots: list[int]) -> None:
        self.name = name
        self.jobs: Collection[Document] = client[DATABASE]["jobs"]
        self._client = client
        self._server = server
        self._roots = roots

    def run(self, script: Path, jobs: int) -> float:
        self.jobs.delete_many({})
        self.jobs.insert_many([new_document("benchmark", str(script)) for _ in range(jobs)])
        unfinished = {"status": {"$in": ["pending", "running"]}}
        # Only whether there is one: to count thousands, again and again, takes the server's time from who is measured.
        wait_for_all(lambda: jobs - self.jobs.count_documents(unfinished, limit=1), jobs)
        documents = list(self.jobs.find({}, {"status": True, "started_at": True, "finished_at": True}))
        failed = [document for document in documents if document["status"] != "completed"]
        if failed:
            raise RuntimeError(f"{len(failed)} jobs failed: {self.jobs.find_one(failed[0]['_id'])}")
        began = min(document["started_at"] for document in documents)
        ended = max(document["finished_at"] for document in documents)
        seconds: float = (ended - began).total_seconds()
        return seconds

    def submit(self, script: Path, *arguments: str) -> None:
        self.jobs.insert_one(new_document("benchmark", str(script), python_args=list(arguments)))

    def pids(self) -> list[int]:
        return tree(*self._roots)

    def database_pids(self) -> list[int]:
        return [self._server.pid]

    def operations(self) -> int:
        return operations_of(self._client)


def operations_of(client: MongoClient[Document]) -> int:
    """Every operation that clients asked of this server."""
    counters: dict[str, int] = client.admin.command("serverStatus")["opcounters"]
    return sum(count for name, count in counters.items() if isinstance(count, int) and name != "deprecated")


def supervisor_side(name: str = "supervisor", **settings: Any) -> StartSide:
    @contextlib.contextmanager
    def start(directory: Path, workers: int) -> Iterator[Side]:
        with MongoServer() as server, MongoClient[Document](server.uri) as client:
            with JobManager(server.uri, DATABASE) as manager:
                manager.jobs.ensure_indexes()
            with running_supervisor(
                directory, server.uri, DATABASE, workers=workers, memory_budget=16384, **settings
            ) as supervisor:
                yield MongoSide(name, server, client, [supervisor.pid])

    return start


def baseline_side(name: str = "polling worker") -> StartSide:
    @contextlib.contextmanager
    def start(directory: Path, workers: int) -> Iterator[Side]:
        with MongoServer() as server, MongoClient[Document](server.uri) as client:
            arguments = ["-m", "tests.benchmarks.baseline", server.uri, DATABASE, str(BASELINE_POLL_SECONDS)]
            with python_programs(workers, arguments, directory=directory) as pids:
                yield MongoSide(name, server, client, pids)

    return start
