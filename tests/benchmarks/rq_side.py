"""RQ on Redis, as it comes: each worker forks a work horse for every job.

    python -m tests.benchmarks.rq_side SOCKET [MODULES]

A worker imports the job's function and these modules once, as RQ's documentation advises.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from rq import Queue, Worker
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from tests.benchmarks import tasks
from tests.benchmarks.redis_server import commands_processed, redis_server
from tests.benchmarks.resources import tree
from tests.benchmarks.sides import Side, StartSide, python_programs, wait_for_all
from tests.support.waiting import wait_until

QUEUE = "default"
KEY = f"{Queue.redis_queue_namespace_prefix}{QUEUE}"


class RqSide:
    """Jobs in an RQ queue."""

    def __init__(self, name: str, client: Redis, roots: list[int], redis_pid: int) -> None:
        self.name = name
        self._client = client
        self._roots = roots
        self._redis_pid = redis_pid
        self._queue = Queue(QUEUE, connection=client)

    def run(self, script: Path, jobs: int) -> float:
        """All jobs are prepared under another key, which is then renamed: queueing them is not what is measured."""
        finished = FinishedJobRegistry(QUEUE, connection=self._client)
        before = self._client.zcard(finished.key)
        staged = Queue(QUEUE, connection=self._client)
        staged._key = f"{KEY}-staged"
        data = [Queue.prepare_data(tasks.run_script, args=(str(script),), result_ttl=3600) for _ in range(jobs)]
        queued = staged.enqueue_many(data)
        self._client.rename(staged._key, KEY)
        wait_for_all(lambda: self._done(finished) - before, jobs)
        ended = Job.fetch_many([job.id for job in queued], connection=self._client)
        ends = [job.ended_at.timestamp() for job in ended if job is not None and job.ended_at]
        starts = [job.started_at.timestamp() for job in ended if job is not None and job.started_at]
        return max(ends) - min(starts)

    def _done(self, finished: FinishedJobRegistry) -> int:
        if self._client.zcard(FailedJobRegistry(QUEUE, connection=self._client).key):
            raise RuntimeError("an RQ job failed")
        return int(self._client.zcard(finished.key))

    def submit(self, script: Path, *arguments: str) -> None:
        self._queue.enqueue(tasks.run_script, str(script), *arguments)

    def pids(self) -> list[int]:
        return tree(*self._roots)

    def database_pids(self) -> list[int]:
        return [self._redis_pid]

    def operations(self) -> int:
        return commands_processed(self._client)


def rq_side(name: str = "RQ", *, preload: str = "") -> StartSide:
    @contextlib.contextmanager
    def start(directory: Path, workers: int) -> Iterator[Side]:
        with redis_server(directory) as (socket, redis_pid), Redis(unix_socket_path=str(socket)) as client:
            arguments = ["-m", "tests.benchmarks.rq_side", str(socket), preload]
            with python_programs(workers, arguments, directory=directory) as pids:
                wait_until(lambda: Worker.count(client) == workers, what="the RQ workers")
                yield RqSide(name, client, pids, redis_pid)

    return start


def work(socket: str, preload: str) -> None:
    for module in filter(None, preload.split(",")):
        importlib.import_module(module)
    Worker([QUEUE], connection=Redis(unix_socket_path=socket)).work(logging_level="WARNING")


if __name__ == "__main__":
    work(*sys.argv[1:])
