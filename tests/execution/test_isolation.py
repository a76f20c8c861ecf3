"""ISOLATION=pidns: nothing of a job outlives those that watch it, and everything else is as without it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from supervisor.execution.isolation import Isolation, why_not_possible
from tests.conftest import Start
from tests.support.running import (
    Document,
    GatedJob,
    Jobs,
    RunningSupervisor,
    free_port,
    is_alive,
    kill_at_once,
    wait_gone,
)
from tests.support.waiting import wait_until

TRIAL = ["unshare", "--pid", "--fork", "true"]
POSSIBLE = shutil.which(TRIAL[0]) and subprocess.run(TRIAL, capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not POSSIBLE, reason="this user may not make PID namespaces")

START_METHODS = ("warm", "exec")


@pytest.fixture
def isolated(start_supervisor: Start) -> RunningSupervisor:
    return start_supervisor(isolation="pidns")


def children_of(process: psutil.Process) -> list[psutil.Process]:
    found: list[psutil.Process] = process.children()
    return found


def family_of(supervisor: RunningSupervisor, job: GatedJob) -> list[psutil.Process]:
    """`init` and everything below it, by the host's process ids; those that the job wrote down are its own."""
    kinds = ("main", "child", "grandchild", "daemon")
    wait_until(lambda: all(job.notes(kind, 1) for kind in kinds), what="the family to be complete")
    own_ids = {job.notes(kind, 1)[0][0] for kind in kinds}
    assert own_ids <= set(range(2, 20)) and 2 in own_ids
    runners = [psutil.Process(pid) for pid in supervisor.runners()]
    (init,) = [child for runner in runners for child in children_of(runner) if child.children()]
    wait_until(lambda: len(init.children()) == 2, what="init to have adopted the daemon")
    family = [init, *filter(is_alive, init.children(recursive=True))]
    assert len(family) == 5
    return family


def assert_ran_again(job: GatedJob) -> None:
    job.wait_started(attempt=2)
    document = job.finish()
    assert (document["status"], document["attempts"], document["losses"]) == ("completed", 2, 1)


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", START_METHODS)
def test_everything_of_ours_killed_at_once(start_supervisor: Start, jobs: Jobs, start_method: str) -> None:
    """Not even a daemon without an environment is left, with nobody there to look for it."""
    first = start_supervisor(isolation="pidns")
    job = jobs.family(hide=True, start_method=start_method)
    family = family_of(first, job)
    kill_at_once(process for process in first.everything() if process not in family)
    first.wait()
    wait_gone(family, within=2)
    start_supervisor(isolation="pidns")
    assert_ran_again(job)


def test_without_isolation_the_next_supervisor_ends_those_with_the_mark(start_supervisor: Start, jobs: Jobs) -> None:
    first = start_supervisor()
    job = jobs.family()
    family = job.wait_family()
    kill_at_once(process for process in first.everything() if process not in family)
    first.wait()
    assert any(map(is_alive, family)), "nothing was left: this test shows nothing"
    start_supervisor()
    assert not [process for process in family if is_alive(process)]
    assert_ran_again(job)


@pytest.mark.parametrize("victim", ["worker", "runner", "warm interpreter", "init", "supervisor"])
def test_one_of_ours_killed(isolated: RunningSupervisor, start_supervisor: Start, jobs: Jobs, victim: str) -> None:
    job = jobs.family(hide=True)
    family = family_of(isolated, job)
    init = family[0]
    pids = {
        "worker": job.get()["lock"]["worker_pid"],
        "runner": init.ppid(),
        "warm interpreter": isolated.warm_interpreter(),
        "init": init.pid,
        "supervisor": isolated.pid,
    }
    os.kill(pids[victim], signal.SIGKILL)
    if victim == "warm interpreter":
        wait_until(lambda: isolated.warm_interpreter() not in (0, pids[victim]), what="a new warm interpreter")
        assert all(map(is_alive, family))
        assert job.finish()["attempts"] == 1
        return
    wait_gone(family, within=2)
    if victim == "init":
        document = jobs.wait(job.id)
        assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "signal", -9)
        return
    if victim == "supervisor":
        isolated.wait()
        start_supervisor(isolation="pidns")
    assert_ran_again(job)


def test_what_a_script_leaves_running_ends_with_it(isolated: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.family(hide=True)
    family = family_of(isolated, job)
    document = job.finish()
    assert not [process for process in family if is_alive(process)]
    assert (document["status"], document["exit_code"]) == ("completed", 0)
    assert "ended 3 processes that it had left running" in "\n".join(document["logs"])


# -- everything else is as without isolation --------------------------------------------------------------------------

ENDINGS = {
    "end": ("pass", 0),
    "exit code": ("raise SystemExit(300)", 44),
    "os._exit": ("import os; os._exit(255)", 255),
    "exception": ("raise ValueError('x')", 1),
    "SIGTERM": ("import os; os.kill(os.getpid(), 15)", -15),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", -9),
    "SIGSEGV": ("import os; os.kill(os.getpid(), 11)", -11),
    "SIGINT": ("raise KeyboardInterrupt", -2),
    "killing init is refused": ("import os; os.kill(os.getppid(), 9); print('on')", 0),
    "everybody else": ("import os, time\nif os.fork() == 0: time.sleep(60)\nos.kill(-1, 9); raise SystemExit(7)", 7),
    "a child ends first": ("import os\nif os.fork() == 0: os._exit(9)\nos.wait(); raise SystemExit(5)", 5),
    "an orphan ends first": (
        "import os, time\nif os.fork() == 0:\n if os.fork() == 0: os._exit(9)\n os._exit(8)\n"
        "os.wait(); time.sleep(0.2); raise SystemExit(6)",
        6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("start_method", START_METHODS)
def test_how_a_job_ended_is_exact(isolated: RunningSupervisor, jobs: Jobs, start_method: str) -> None:
    submitted = {
        name: jobs.submit(jobs.script(source, f"{number}.py"), start_method=start_method)
        for number, (name, (source, _)) in enumerate(ENDINGS.items())
    }
    found = {name: jobs.wait(job_id)["exit_code"] for name, job_id in submitted.items()}
    assert found == {name: exit_code for name, (_, exit_code) in ENDINGS.items()}


@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_a_job_sees(isolated: RunningSupervisor, jobs: Jobs, start_method: str) -> None:
    source = (
        "import os\n"
        "print(os.getpid(), os.getppid(), os.getsid(0), sorted(map(int, os.listdir('/proc/self/fd')))[:-1],"
        " os.environ['JOB_ATTEMPT'])"
    )
    script = jobs.script(source)
    job_id = jobs.submit(script, start_method=start_method)
    document = jobs.wait(job_id)
    assert document["status"] == "completed", document["logs"]
    assert jobs.output(job_id) == b"2 1 2 [0, 1, 2] 1\n"


@pytest.mark.parametrize("start_method", START_METHODS)
def test_memory_is_enforced(isolated: RunningSupervisor, jobs: Jobs, start_method: str) -> None:
    """In a daemon, too; and a job below its limit is left alone."""
    hog = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        kept = []
        while True:
            kept.append(bytearray(4 << 20))
            time.sleep(0.002)
    os._exit(0)
time.sleep(600)
"""
    document = jobs.run(hog, required_memory=64, start_method=start_method)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "memory_exceeded", -9)
    assert "of the 64 MB in required_memory" in document["error"]
    assert 64 <= document["peak_memory"] < 120
    modest = "import time; kept = bytearray(40 << 20); time.sleep(0.5)"
    document = jobs.run(modest, required_memory=64, start_method=start_method)
    assert (document["status"], document["reason"]) == ("completed", None)
    assert 40 <= document["peak_memory"] <= 64


def test_a_warm_job_says_where_it_allocated(isolated: RunningSupervisor, jobs: Jobs) -> None:
    """If it gets to run within the few milliseconds that the kill waits for it: on a busy host not each time."""
    script = jobs.script("def greedy():\n    kept = []\n    while True: kept.append(bytearray(1 << 20))\ngreedy()\n")

    def says_where() -> bool:
        job_id = jobs.submit(script, required_memory=64)
        assert jobs.wait(job_id)["reason"] == "memory_exceeded"
        return b"in greedy" in jobs.output(job_id, "stderr")

    assert any(says_where() for _ in range(10))


def test_a_job_that_asks_for_it_is_warned(isolated: RunningSupervisor, jobs: Jobs) -> None:
    script = jobs.script("""
import signal, sys, time
def warned(*_):
    print("warned", flush=True)
    sys.exit(3)
signal.signal(signal.SIGUSR1, warned)
kept = bytearray(60 << 20)
time.sleep(60)
""")
    job_id = jobs.submit(script, required_memory=64, memory_warning=True)
    document = jobs.wait(job_id)
    assert (document["exit_code"], jobs.output(job_id)) == (3, b"warned\n"), document["logs"]


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_timeout_is_a_sigterm_first(isolated: RunningSupervisor, jobs: Jobs, start_method: str) -> None:
    polite = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
time.sleep(60)
"""
    document = jobs.run(polite, timeout=1, start_method=start_method)
    assert ended(document) == ("failed", "timeout", 9)
    document = jobs.run("import time; time.sleep(60)", timeout=1, start_method=start_method)
    assert ended(document) == ("failed", "timeout", -15)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    document = jobs.run(deaf, timeout=1, start_method=start_method)
    assert ended(document) == ("failed", "timeout", -9)


def ended(document: Document) -> tuple[object, ...]:
    return document["status"], document["reason"], document["exit_code"]


def test_cancelling(isolated: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.gated()
    wait_until(lambda: job.notes("main", 1), what="the job to start")
    assert isolated.command("jobs", "cancel", job.id).returncode == 0
    assert jobs.wait(job.id)["status"] == "cancelled"


def test_a_job_that_cannot_be_started_says_so(start_supervisor: Start, jobs: Jobs) -> None:
    python = jobs.script(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "python")
    python.chmod(0o755)
    start_supervisor(isolation="pidns", python=python)
    jobs.script("#!/missing/interpreter\n", "python")
    document = jobs.run("pass", start_method="exec")
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "start_failed", None)
    assert document["error"].startswith("could not be started: No such file or directory")


# -- where it is not possible -----------------------------------------------------------------------------------------


def test_without_the_right_to_it_the_start_fails(tmp_path: Path) -> None:
    supervisor = RunningSupervisor(
        tmp_path, "mongodb://127.0.0.1:1", "none", isolation="pidns", metrics_port=free_port()
    )
    without_capability = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    result = subprocess.run(
        [*without_capability, sys.executable, "-m", "supervisor"],
        env=supervisor.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "SUPERVISOR_ISOLATION" in result.stderr and "not permitted" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_value_is_refused(tmp_path: Path) -> None:
    result = RunningSupervisor(tmp_path, "", "none", isolation="jail").command("run")
    assert result.returncode == 2
    assert "SUPERVISOR_ISOLATION" in result.stderr


def test_the_runner_itself_stays_where_it_is() -> None:
    """It forks many jobs, and other processes, too."""
    assert why_not_possible() is None
    pid = os.fork()
    if pid == 0:
        isolation = Isolation()
        for expected in range(3):
            init = isolation.fork()
            if init == 0:
                os._exit(expected if os.getpid() == 2 else 99)
            exit_code = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
            if isolation.outcome(exit_code) != (expected, 0):
                os._exit(1)
        plain = os.fork()
        if plain == 0:
            os._exit(os.readlink("/proc/self") != str(os.getpid()))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(plain, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
