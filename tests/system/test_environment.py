"""What a job process finds: nothing of the supervisor's, and everything it was promised. And how it may end."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.conftest import Shared, Start
from tests.support.running import Jobs

METHODS = pytest.mark.parametrize("start_method", ["warm", "exec"])
LOOK = """
import json, os, signal, sys
found = {
    "argv": sys.argv, "file": __file__, "path0": sys.path[0], "name": __name__,
    "environ": dict(os.environ), "cwd": os.getcwd(),
    "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(),
    "descriptors": [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")],
    "stdin": sys.stdin.read(),
    "ignored": [n for n in range(1, 32) if signal.getsignal(n) == signal.SIG_IGN],
    "mask": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": len(os.listdir("/proc/self/task")),
    "initial": open("/proc/self/environ").read().split("\\0"),
}
print(json.dumps(found))
"""


def look(shared: Shared, *arguments: str, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    document = shared.jobs.run(LOOK, *arguments, **fields)
    assert document["status"] == "completed", document["error"]
    found: dict[str, Any] = json.loads(shared.jobs.output(document["_id"]))
    return found, document


@METHODS
def test_a_job_finds_what_a_script_finds(shared: Shared, start_method: str) -> None:
    found, document = look(shared, "a b", "", "ü$HOME", start_method=start_method)
    assert found["argv"] == [document["python_path"], "a b", "", "ü$HOME"]
    assert found["file"] == document["python_path"]
    assert found["path0"] == os.path.dirname(document["python_path"])
    assert found["name"] == "__main__"
    assert found["session"] and found["group"]
    assert found["descriptors"] == ["0", "1", "2"]
    assert found["stdin"] == ""
    assert found["mask"] == 0
    assert found["threads"] == 1
    assert found["cwd"] == str(shared.jobs.directory)


@METHODS
def test_a_setting_in_lower_case_is_withheld_too(
    monkeypatch: pytest.MonkeyPatch, start_supervisor: Start, jobs: Jobs, start_method: str
) -> None:
    monkeypatch.setenv("supervisor_password", "secret")
    start_supervisor(workers=1)
    document = jobs.run("import os; print([each for each in os.environ.items()])", start_method=start_method)
    assert document["status"] == "completed"
    assert b"JOB_ID" in jobs.output(document["_id"])
    assert b"secret" not in jobs.output(document["_id"])


@METHODS
def test_a_job_gets_its_variables_and_no_secret(shared: Shared, start_method: str) -> None:
    found, document = look(shared, start_method=start_method, env={"COLOUR": "blue", "EMPTY": ""}, required_memory=77)
    environ = found["environ"]
    assert environ["JOB_ID"] == str(document["_id"])
    assert environ["JOB_ATTEMPT"] == "1"
    assert environ["JOB_REQUIRED_MEMORY"] == "77"
    assert (environ["COLOUR"], environ["EMPTY"]) == ("blue", "")
    assert environ["PATH"] == os.environ["PATH"]
    assert not [name for name in environ if name.startswith("SUPERVISOR_")]
    for value in [*environ.values(), *found["initial"]]:
        assert shared.supervisor.mongo_uri not in value


@METHODS
def test_a_working_directory(shared: Shared, start_method: str) -> None:
    directory = shared.jobs.directory / "elsewhere"
    directory.mkdir(exist_ok=True)
    found, _ = look(shared, start_method=start_method, cwd=str(directory))
    assert found["cwd"] == str(directory)


def test_one_job_leaves_nothing_to_the_next(shared: Shared) -> None:
    shared.jobs.run("import os, sys, json; os.environ['LEFT'] = '1'; sys.modules['left'] = json; os.chdir('/')")
    found, _ = look(shared)
    assert "LEFT" not in found["environ"]
    assert found["cwd"] == str(shared.jobs.directory)


@METHODS
@pytest.mark.parametrize(
    ("source", "exit_code"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(1)", 1),
        ("raise SystemExit(300)", 44),
        ("raise SystemExit(-1)", 255),
        ("raise SystemExit('sentence')", 1),
        ("raise ValueError('sentence')", 1),
        ("import os; os._exit(3)", 3),
        ("import os; os._exit(127)", 127),
        ("import os; os.abort()", -6),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import ctypes; ctypes.string_at(0)", -11),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("raise KeyboardInterrupt", -2),
        ("def f(:", 1),
    ],
)
def test_exit_codes_are_recorded_exactly(shared: Shared, start_method: str, source: str, exit_code: int) -> None:
    document = shared.jobs.run(source, start_method=start_method)
    assert document["exit_code"] == exit_code
    if exit_code == 0:
        assert (document["status"], document["reason"], document["error"]) == ("completed", None, None)
    else:
        reason = "signal" if exit_code < 0 else "exit_code"
        assert (document["status"], document["reason"]) == ("failed", reason)
        assert f"signal {-exit_code} (SIG" in document["error"] or f"code {exit_code}" in document["error"]
        assert (document["attempts"], document["failures"]) == (1, 1)
    if "sentence" in source:
        assert "sentence" in document["error"]
    if "f(:" in source:
        assert "SyntaxError" in document["error"]
