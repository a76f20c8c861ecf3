"""RUN_AS: jobs run as another user, under the same supervision. Only root can give a process to somebody else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import JobManager
from supervisor.errors import ConfigurationError
from supervisor.settings import account_of, load_settings
from tests.support.commands import Commands
from tests.support.running import Jobs, RunningSupervisor, is_alive, running_supervisor, wait_gone
from tests.support.waiting import wait_until

USER = "nobody"
PYTHONS = [sys.executable, "/usr/bin/python3"]
WHO = """
import os, sys
name = lambda path: open(path).read() if os.access(path, os.R_OK) else "refused"
print(os.getresuid(), os.getresgid(), sorted(os.getgroups()))
print({key: os.environ.get(key) for key in ("HOME", "USER", "LOGNAME")})
print(name("/proc/self/environ").count("JOB_ID"))
print(os.getcwd())
with open("/dev/stdout", "w") as stdout:
    stdout.write("reopened\\n")
for attempt in (lambda: os.kill(os.getppid(), 0), lambda: os.setuid(0), lambda: open("/etc/shadow"),
                lambda: os.listdir(sys.argv[1]), lambda: open(f"/proc/{os.getppid()}/environ").read()):
    try:
        attempt()
        print("allowed")
    except PermissionError:
        print("refused")
"""
HOG = "import time\nhold = []\nwhile True:\n    hold.append(bytearray(b'x' * 1_000_000))\n    time.sleep(0.001)"


def _is_executable_for_user(python: str) -> bool:
    tried = [python, "-c", "pass"]
    return Path(python).exists() and subprocess.run(tried, user=USER, cwd="/", check=False).returncode == 0


def _python_of_user() -> str | None:
    for python in PYTHONS:
        try:
            if _is_executable_for_user(python):
                return python
        except OSError:
            continue
    return None


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs as another user")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that others may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="run-as-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["warm", "exec"])
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of a start method, with an interpreter that the user can execute."""
    if request.param == "warm":
        return {"start_method": "warm"}
    python = _python_of_user()
    if python is None:
        pytest.skip(f"{USER} can execute none of {', '.join(PYTHONS)}")
    return {"start_method": "exec", "python": python}


@pytest.fixture
def supervisor(directory: Path, mongo_uri: str, db_name: str, method: dict[str, Any]) -> Iterator[RunningSupervisor]:
    with running_supervisor(directory, mongo_uri, db_name, run_as=USER, **method) as supervisor:
        yield supervisor


@pytest.fixture
def jobs(directory: Path, manager: JobManager) -> Jobs:
    """Scripts and records in a directory that belongs to nobody in particular."""
    (directory / "work").mkdir()
    (directory / "work").chmod(0o777)
    return Jobs(directory / "work", manager)


def test_a_job_is_that_user_and_nothing_of_root(supervisor: RunningSupervisor, jobs: Jobs, directory: Path) -> None:
    (directory / "closed").mkdir(mode=0o700)
    done = jobs.run(WHO, directory / "closed", cwd=str(jobs.directory))
    assert done["status"] == "completed", done
    assert not any("started by exec" in line for line in done["logs"]) or supervisor_is_exec(supervisor), done["logs"]
    lines = sorted(jobs.output(done["_id"]).decode().splitlines(), key=lambda line: line == "reopened")
    assert lines[0] == "(65534, 65534, 65534) (65534, 65534, 65534) [65534]"
    home = os.path.expanduser(f"~{USER}")
    assert lines[1] == str({"HOME": home, "USER": USER, "LOGNAME": USER})
    assert lines[2:4] == ["1", str(jobs.directory)]
    assert lines[4:] == ["refused"] * 5 + ["reopened"]


def supervisor_is_exec(supervisor: RunningSupervisor) -> bool:
    return supervisor.environment["SUPERVISOR_START_METHOD"] == "exec"


def test_a_jobs_own_home_is_respected(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    if not supervisor_is_exec(supervisor):
        pytest.skip("a job with its own HOME is executed")
    done = jobs.run("import os; print(os.environ['HOME'], os.environ['USER'])", env={"HOME": "/own"})
    assert jobs.output(done["_id"]).decode() == f"/own {USER}\n"


def test_memory_timeout_and_cancel_are_enforced(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    script = jobs.script(HOG, "hog.py")
    hog = jobs.wait(jobs.submit(script, required_memory=64))
    assert (hog["status"], hog["reason"]) == ("failed", "memory_exceeded"), hog
    assert 64 <= hog["peak_memory"] < 150
    late = jobs.gated(timeout=0.5)
    assert jobs.wait(late.id)["reason"] == "timeout"
    cancelled = jobs.gated()
    cancelled.wait_started()
    jobs.manager.cancel_job(cancelled.id)
    assert jobs.wait(cancelled.id)["status"] == "cancelled"


def test_its_whole_family_ends_with_it(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.family()
    family = job.wait_family()
    assert {process.uids().effective for process in family} == {65534}
    job.finish("completed")
    wait_gone(family)


def test_a_killed_runner_takes_the_job_with_it(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    """setuid makes the kernel forget the parent-death signal: it is set again."""
    job = jobs.gated()
    process = psutil.Process(job.wait_started())
    # Neither the worker nor the supervisor may be what ends it.
    stopped = [psutil.Process(pid) for pid in (supervisor.pid, *supervisor.workers())]
    runner = process.parent()
    assert runner is not None
    for each in stopped:
        each.suspend()
    try:
        runner.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(process), timeout=5, what="the job to end with its runner")
    finally:
        for each in stopped:
            each.resume()
    job.finish("completed")
    assert job.get()["attempts"] == 2


def test_a_script_that_the_user_may_not_read_fails(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    script = jobs.script("print('read')", "closed.py")
    script.chmod(0o600)
    done = jobs.wait(jobs.submit(script))
    assert done["status"] == "failed" and done["reason"] in ("exit_code", "start_failed"), done
    assert b"read\n" not in jobs.output(done["_id"])


def test_a_directory_that_the_user_may_not_enter_is_named(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    closed = jobs.directory / "closed"
    closed.mkdir(mode=0o700)
    done = jobs.run("pass", cwd=str(closed))
    assert (done["status"], done["reason"]) == ("failed", "start_failed")
    assert done["error"] == f"could not be started: Permission denied: {closed}"


def test_an_unknown_user_stops_the_start(mongo_uri: str, db_name: str, tmp_path: Path) -> None:
    commands = Commands(mongo_uri, db_name, tmp_path)
    answer = commands("run", environment={"SUPERVISOR_RUN_AS": "nobody-of-that-name"})
    assert answer.code == 2
    assert answer.err == "error: SUPERVISOR_RUN_AS: there is no user 'nobody-of-that-name'\n"


def test_only_root_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert account_of(load_settings(run_as=USER)) is None, "it is that user already"
    with pytest.raises(ConfigurationError, match="RUN_AS: only root"):
        account_of(load_settings(run_as="daemon"))


def test_a_user_is_named_or_numbered() -> None:
    by_name, by_number = account_of(load_settings(run_as=USER)), account_of(load_settings(run_as="65534"))
    assert by_name == by_number and by_name is not None
    assert json.loads(json.dumps(by_name.ids))[0] == 65534
    assert account_of(load_settings()) is None and account_of(load_settings(run_as="root")) is None
