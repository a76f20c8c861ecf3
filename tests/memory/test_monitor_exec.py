"""A process that is met in the middle of its exec, as happens on a busy host, is not taken for a stranger later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

JOB = """
import os, sys, time
kept = b"x" * (40 << 20)
print("filled", flush=True)
sys.stdin.read(1)
for _ in range(3):
    if os.fork() == 0:
        time.sleep(600)
print("forked", flush=True)
time.sleep(600)
"""
WATCHER = """
import os, subprocess, sys, time
from supervisor.memory.monitor import MB, MemoryMonitor
from supervisor.processes import become_subreaper, kill_descendants
become_subreaper()
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
monitor = MemoryMonitor(os.getpid(), 64 * MB, interval=0.1)
assert job.stdout.readline() == b"filled\\n"
monitor.look(time.monotonic())
monitor._members[job.pid].image = 1  # the kernel changes it more than once during an exec
job.stdin.close()
assert job.stdout.readline() == b"forked\\n"
for _ in range(3):
    time.sleep(0.02)
    print(monitor.look(time.monotonic()))
kill_descendants(os.getpid())
"""


def test_its_children_share_its_memory() -> None:
    watched = subprocess.run(
        [sys.executable, "-c", WATCHER, JOB],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert watched.stdout.split() == ["None"] * 3, watched.stderr
