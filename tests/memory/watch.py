"""A runner in small: starts one job, watches it with a MemoryMonitor, ends it, and tells as JSON what it saw.

    python -m tests.memory.watch '{"start": "exec", "shape": ["grow", "100"], "limit_mb": 64, ...}'

As in the supervisor, the runner is a fork of an interpreter that has loaded something, and has siblings. It watches
until the limit is exceeded, or until it looked `looks_after` times since the job had taken all it wanted.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

from supervisor.memory.monitor import MemoryMonitor, Overrun
from supervisor.memory.usage import tree_usage
from supervisor.processes import become_subreaper, die_with_parent, kill_descendants
from tests.memory import shapes

MB = 1 << 20


def main(order: dict[str, Any]) -> None:
    shapes.PRELOADED = shapes.filled(order.get("preloaded_mb", 0))
    me = os.getpid()
    children = []
    for work in [lambda: signal.pause(), lambda: print(json.dumps(watch(order)), flush=True)]:
        pid = os.fork()
        if pid == 0:
            die_with_parent(me, signal.SIGKILL)
            work()
            os._exit(0)
        children.append(pid)
    sibling, runner = children
    os.waitpid(runner, 0)
    os.kill(sibling, signal.SIGKILL)
    os.waitpid(sibling, 0)


def watch(order: dict[str, Any]) -> dict[str, Any]:
    become_subreaper()
    ready, job_output = os.pipe()
    job = start(order, job_output)
    os.close(job_output)
    limit = order["limit_mb"] * MB
    monitor = MemoryMonitor(os.getpid(), limit, interval=order.get("interval", 0.1))
    try:
        overrun, looks = look_on(monitor, ready, order)
        usage = {pid: one.charged for pid, one in tree_usage(os.getpid()).items()}
        return {
            "job": job,
            "used_mb": monitor.used / MB,
            "peak_mb": monitor.peak / MB,
            "exact_mb": sum(usage.values()) / MB,
            "processes": len(usage),
            "series": [[seconds, used / MB] for seconds, used in monitor.series()],
            "looks": looks,
            "overrun": overrun
            and {
                "used_mb": overrun.used / MB,
                "limit_mb": overrun.limit / MB,
                "shares": [[share.pid, share.command, share.bytes / MB] for share in overrun.processes],
            },
        }
    finally:
        monitor.close()
        assert kill_descendants(os.getpid()).complete


def start(order: dict[str, Any], job_output: int) -> int:
    name, *arguments = order["shape"]
    runner = os.getpid()
    job = os.fork()
    if job == 0:
        os.setsid()
        die_with_parent(runner, signal.SIGKILL)
        os.dup2(job_output, 1)
        if order["start"] == "exec":
            os.execv(sys.executable, [sys.executable, shapes.__file__, name, *arguments])
        shapes.run(name, arguments)
        os._exit(0)
    return job


def look_on(monitor: MemoryMonitor, ready: int, order: dict[str, Any]) -> tuple[Overrun | None, int]:
    give_up = time.monotonic() + order.get("give_up", 60)
    looks = 0
    looks_wanted: int | None = None
    while looks_wanted is None or looks < looks_wanted:
        now = time.monotonic()
        if now > give_up:
            raise AssertionError(f"the job neither got ready nor was reported: {monitor.used / MB:.0f} MB used")
        wait = max(0.0, monitor.next_look - now)
        if looks_wanted is None and select.select([ready], [], [], wait)[0]:
            if not os.read(ready, 1):
                raise AssertionError("the job has ended by itself")
            looks_wanted = looks + order.get("looks_after", 1_000_000)
        elif looks_wanted is not None:
            time.sleep(wait)
        now = time.monotonic()
        if now >= monitor.next_look:
            looks += 1
            overrun = monitor.look(now)
            if overrun is not None:
                return overrun, looks
    return None, looks


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
