"""A spare takes in any number of rehearsals, and becomes only what it is told with standard output and error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

RUNNER = """
import json, os, sys
from supervisor.execution.child import Launch
from supervisor.execution.spare import Spare, fork_spare

def launch(path):
    return Launch(path=path, args=["\\udcff", "x" * int(sys.argv[1])], env={}, cwd=None, start_method="warm", python="")

reader, writer = os.pipe()
null = os.open(os.devnull, os.O_WRONLY)
forked = fork_spare()
if isinstance(forked, Spare):
    forked.rehearse(launch("rehearsal"))
    forked.rehearse(launch("another"))
    started = len(sys.argv) < 3 and forked.start(launch("job"), writer, null)
    forked.dismiss()
    os.close(writer)
    said = os.read(reader, 1000).decode()
    _, status = os.waitpid(forked.pid, 0)
    print(json.dumps({"started": started, "said": said, "status": status, "leads": said == f"job {forked.pid}"}))
else:
    assert forked.launch.args == launch("").args
    os.write(forked.descriptors[0], f"{forked.launch.path} {os.getsid(0)}".encode())
    os._exit(0)
"""


def run(*arguments: str) -> dict[str, Any]:
    answer = subprocess.run([sys.executable, "-c", RUNNER, *arguments], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    ended: dict[str, Any] = json.loads(answer.stdout)
    return ended


def test_it_becomes_the_job_after_rehearsals_in_a_session_of_its_own() -> None:
    ended = run("1")
    assert (ended["started"], ended["leads"], ended["status"]) == (True, True, 0)


def test_it_takes_a_job_of_any_size() -> None:
    ended = run("1000000")
    assert ended["started"]
    assert ended["leads"]


def test_it_ends_by_itself_when_it_is_dismissed() -> None:
    assert run("1", "dismissed") == {"started": False, "said": "", "status": 0, "leads": False}
