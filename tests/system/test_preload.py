"""Modules that the warm interpreter loads ahead: changed, broken, deadly, with threads."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.support.running import Jobs, RunningSupervisor
from tests.support.waiting import wait_until

TIMES = itertools.count(1_000_000_000, 1000)
SHOW = "import sys; print(sys.modules['ahead'].VALUE if 'ahead' in sys.modules else 'not loaded')"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """Where the modules are; not beside the scripts, where they would be the scripts' own."""
    path = tmp_path / "modules"
    path.mkdir()
    return path


def write(modules: Path, name: str, source: str) -> None:
    """With a time of its own, however coarse the clock of the file system."""
    path = modules / f"{name}.py"
    path.write_text(source)
    moment = next(TIMES)
    os.utime(path, (moment, moment))


def said(jobs: Jobs, source: str = SHOW) -> str:
    document = jobs.run(source)
    assert document["status"] == "completed", document
    return jobs.output(document["_id"]).decode().strip()


def reasons(supervisor: RunningSupervisor) -> str:
    status, body = supervisor.get("/readyz")
    return body if status == 503 else ""


def test_a_module_that_changes_is_loaded_anew(start_supervisor: Start, jobs: Jobs, modules: Path) -> None:
    write(modules, "ahead", "VALUE = 1")
    supervisor = start_supervisor(preload="ahead", module_path=modules)
    assert said(jobs) == "1"
    before = supervisor.warm_interpreter()
    write(modules, "ahead", "VALUE = 22")
    wait_until(lambda: supervisor.warm_interpreter() not in (before, 0), what="another interpreter")
    wait_until(lambda: said(jobs) == "22", what="the new code to run")


def test_a_broken_module_is_left_out_until_it_is_repaired(start_supervisor: Start, jobs: Jobs, modules: Path) -> None:
    write(modules, "ahead", "VALUE = (")
    supervisor = start_supervisor(preload="ahead", module_path=modules, ready=False)
    wait_until(lambda: "ahead cannot be imported: SyntaxError" in reasons(supervisor), what="the reason")
    assert "ahead cannot be imported" in supervisor.log()
    assert said(jobs) == "not loaded"
    write(modules, "ahead", "VALUE = 3")
    wait_until(supervisor.is_ready, what="the supervisor to be ready")
    wait_until(lambda: said(jobs) == "3", what="the module to be loaded")


def test_a_module_that_ends_the_interpreter_is_left_out(start_supervisor: Start, jobs: Jobs, modules: Path) -> None:
    write(modules, "deadly", "import os; os._exit(3)")
    write(modules, "ahead", "VALUE = 4")
    supervisor = start_supervisor(preload="deadly,ahead", module_path=modules, ready=False)
    wait_until(lambda: "deadly ends the interpreter" in reasons(supervisor), what="the reason")
    assert said(jobs) == "4"
    write(modules, "deadly", "pass")
    wait_until(supervisor.is_ready, what="the supervisor to be ready")


def test_a_module_that_starts_a_thread_is_left_out(start_supervisor: Start, jobs: Jobs, modules: Path) -> None:
    write(modules, "busy", "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()")
    write(modules, "ahead", "VALUE = 5")
    supervisor = start_supervisor(preload="busy,ahead", module_path=modules, ready=False)
    wait_until(lambda: "busy starts a thread" in reasons(supervisor), what="the reason")
    assert said(jobs) == "5"


def test_a_module_that_is_missing_is_said(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(preload="no_such_module", ready=False)
    wait_until(lambda: "no_such_module cannot be imported" in reasons(supervisor), what="the reason")
    assert said(jobs) == "not loaded"
    supervisor.signal(signal.SIGHUP)
    wait_until(lambda: supervisor.log().count("no_such_module cannot be imported") == 2, what="another try")


def test_where_a_module_goes_jobs_do_not_follow(start_supervisor: Start, jobs: Jobs, modules: Path) -> None:
    write(modules, "ahead", "import os; os.chdir('/'); VALUE = 6")
    supervisor = start_supervisor(preload="ahead", module_path=modules)
    assert said(jobs, "import os; print(os.getcwd())") == str(supervisor.directory)
    assert said(jobs) == "6"
