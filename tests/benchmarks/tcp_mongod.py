"""A throwaway standalone mongod on TCP: Celery's MongoDB transport understands no Unix socket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from supervisor.store.embedded import find_mongod
from tests.benchmarks.sides import program
from tests.support.running import free_port
from tests.support.waiting import wait_until


@contextlib.contextmanager
def tcp_mongod(directory: Path) -> Iterator[tuple[str, int]]:
    """Its address, and its process id."""
    data = directory / "mongod"
    data.mkdir()
    port = free_port()
    address = f"mongodb://127.0.0.1:{port}"
    arguments = [str(find_mongod()), "--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket"]
    arguments += ["--dbpath", str(data), "--wiredTigerCacheSizeGB", "0.25"]
    with program(arguments, directory=directory) as process:
        wait_until(lambda: _answers(address), timeout=60, what="mongod to answer")
        yield address, process.pid


def _answers(address: str) -> bool:
    with (
        MongoClient[dict[str, Any]](address, serverSelectionTimeoutMS=250) as client,
        contextlib.suppress(PyMongoError),
    ):
        client.admin.command("ping")
        return True
    return False
