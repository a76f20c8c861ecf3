"""Celery with its prefork pool: a fixed number of processes, each runs one job after the other in itself.

There is no process per job: what a script leaves behind or breaks, the next one finds. With Redis as broker and result
backend, or with MongoDB as both.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import Celery  # type: ignore[import-untyped]
from pymongo import MongoClient
from redis import Redis

from tests.benchmarks import tasks
from tests.benchmarks.mongo_sides import operations_of
from tests.benchmarks.redis_server import commands_processed, redis_server
from tests.benchmarks.resources import tree
from tests.benchmarks.sides import Side, StartSide, program, wait_for_all
from tests.benchmarks.tcp_mongod import tcp_mongod
from tests.support.running import PYTHON
from tests.support.waiting import wait_until

QUEUE = "celery"
STAGED = "staged"
BROKER_VARIABLE = "BENCHMARK_CELERY_BROKER"
BACKEND_VARIABLE = "BENCHMARK_CELERY_BACKEND"


def application(broker: str, backend: str) -> Celery:
    app = Celery("benchmark", broker=broker, backend=backend)
    app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True, result_expires=3600)
    app.task(name="run_script")(tasks.run_script)
    return app


app = application(os.environ.get(BROKER_VARIABLE, "memory://"), os.environ.get(BACKEND_VARIABLE, "cache+memory://"))


class CelerySide:
    """Jobs as Celery messages."""

    def __init__(
        self,
        name: str,
        celery: Celery,
        roots: list[int],
        database_pid: int,
        *,
        release: Callable[[], object],
        results: Callable[[], int],
        operations: Callable[[], int],
    ) -> None:
        self.name = name
        self.operations = operations
        self._task = celery.tasks["run_script"]
        self._roots = roots
        self._database_pid = database_pid
        self._release = release
        self._results = results

    def run(self, script: Path, jobs: int) -> float:
        """The messages are put into another queue, which then becomes the real one. The clock is the watcher's:
        Celery does not record when a task began. It looks 20 times a second."""
        before = self._results()
        for _ in range(jobs):
            self._task.apply_async((str(script),), queue=STAGED)
        began = time.perf_counter()
        self._release()
        wait_for_all(lambda: self._results() - before, jobs)
        return time.perf_counter() - began

    def submit(self, script: Path, *arguments: str) -> None:
        self._task.apply_async((str(script), *arguments))

    def pids(self) -> list[int]:
        return tree(*self._roots)

    def database_pids(self) -> list[int]:
        return [self._database_pid]


@contextlib.contextmanager
def _worker(directory: Path, workers: int, broker: str, backend: str) -> Iterator[tuple[Celery, int]]:
    celery = application(broker, backend)
    arguments = [PYTHON, "-m", "celery", "-A", "tests.benchmarks.celery_side", "worker"]
    arguments += ["--pool", "prefork", "--concurrency", str(workers), "--loglevel", "WARNING"]
    environment = {BROKER_VARIABLE: broker, BACKEND_VARIABLE: backend}
    with program(arguments, directory=directory, environment=environment) as process:
        wait_until(lambda: celery.control.ping(timeout=1.0), timeout=60, what="the Celery worker")
        yield celery, process.pid
    celery.close()


def celery_redis_side(name: str = "Celery, Redis") -> StartSide:
    @contextlib.contextmanager
    def start(directory: Path, workers: int) -> Iterator[Side]:
        with redis_server(directory) as (socket, redis_pid), Redis(unix_socket_path=str(socket)) as client:
            broker = f"redis+socket://{socket}"
            with _worker(directory, workers, broker, broker) as (celery, pid):
                yield CelerySide(
                    name,
                    celery,
                    [pid],
                    redis_pid,
                    release=lambda: client.rename(STAGED, QUEUE),
                    results=lambda: len(client.keys("celery-task-meta-*")),
                    operations=lambda: commands_processed(client),
                )

    return start


def celery_mongo_side(name: str = "Celery, MongoDB") -> StartSide:
    @contextlib.contextmanager
    def start(directory: Path, workers: int) -> Iterator[Side]:
        with tcp_mongod(directory) as (address, mongod_pid), MongoClient[dict[str, Any]](address) as client:
            broker = f"{address}/celery_broker"
            backend = f"{address}/celery_results"
            with _worker(directory, workers, broker, backend) as (celery, pid):
                messages = client["celery_broker"]["messages"]
                results = client["celery_results"]["celery_taskmeta"]
                yield CelerySide(
                    name,
                    celery,
                    [pid],
                    mongod_pid,
                    release=lambda: messages.update_many({"queue": STAGED}, {"$set": {"queue": QUEUE}}),
                    results=lambda: results.count_documents({"status": "SUCCESS"}),
                    operations=lambda: operations_of(client),
                )

    return start
