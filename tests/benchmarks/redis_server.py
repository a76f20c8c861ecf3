"""A throwaway Redis on a Unix socket, without persistence: the fastest it can be."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError as RedisUnavailable

from tests.benchmarks.sides import program
from tests.support.waiting import wait_until


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[tuple[Path, int]]:
    """The path of its socket, and its process id."""
    executable = shutil.which("redis-server")
    if executable is None:
        raise FileNotFoundError("redis-server is not installed (Debian: apt-get install redis-server)")
    socket = directory / "redis.sock"
    arguments = [executable, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    with program(arguments, directory=directory) as process:
        wait_until(lambda: _answers(socket), what="Redis to answer")
        yield socket, process.pid


def _answers(socket: Path) -> bool:
    with Redis(unix_socket_path=str(socket)) as client, contextlib.suppress(RedisUnavailable):
        return bool(client.ping())
    return False


def commands_processed(client: Redis) -> int:
    answer = client.info("stats")
    return int(answer["total_commands_processed"])
