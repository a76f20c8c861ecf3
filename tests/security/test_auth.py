"""A MongoDB that checks passwords: what a wrong one looks like, and that a right one is seen by nobody."""

from __future__ import annotations

import collections
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient

from supervisor import JobManager
from supervisor.errors import StoreUnavailable
from supervisor.events import REPEATS_PER_MINUTE
from tests.security.conftest import PASSWORDS, Guarded, without_secrets
from tests.support.commands import Commands
from tests.support.running import Jobs, RunningSupervisor, running_supervisor
from tests.support.waiting import wait_until

WRONG = "wr0ng/pass+word@twice"
READS_EVERYTHING = """
import json, os, sys
found = {}
for name in ("environ", "cmdline"):
    for pid in ("self", os.getppid()):
        try:
            found[f"{pid}/{name}"] = open(f"/proc/{pid}/{name}", "rb").read().decode("utf-8", "replace")
        except OSError as error:
            found[f"{pid}/{name}"] = str(error)
found["os.environ"] = dict(os.environ)
found["descriptors"] = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "command",
    [["run"], ["status"], ["jobs", "list"], ["jobs", "show", "x"], ["jobs", "wait", "x"], ["status", "--json"]],
    ids=" ".join,
)
def test_a_wrong_password_is_one_line_and_exit_code_3(guarded: Guarded, tmp_path: Path, command: list[str]) -> None:
    commands = Commands(guarded.server.uri_of("reader", WRONG, source=guarded.db_name), guarded.db_name, tmp_path)
    answer = commands(*command)
    assert answer.code == 3
    if "--json" in command:
        assert answer.err == f"error: {answer.document['error']}\n"
    else:
        assert answer.out == ""
    assert re.fullmatch(r"error: MongoDB at mongodb://\*\*\*@[\d.:]+/\S* refuses: .*\n", answer.err), answer.err
    assert "wr0ng" not in answer.err and "twice" not in answer.err


def test_doctor_and_producer_say_the_same(guarded: Guarded, tmp_path: Path) -> None:
    commands = Commands(guarded.server.uri_of("reader", WRONG, source=guarded.db_name), guarded.db_name, tmp_path)
    script = tmp_path / "job.py"
    script.write_text("pass")
    for answer in (
        commands("doctor"),
        commands("doctor", "--json"),
        commands.producer("submit", str(script)),
        commands.producer("demo"),
        commands.producer("import", "-", stdin=json.dumps({"request_name": "x", "python_path": str(script)}).encode()),
    ):
        assert answer.code == 3, answer
        assert "refuses" in answer.out + answer.err
        assert "wr0ng" not in answer.out + answer.err and "twice" not in answer.out + answer.err


def test_a_missing_password_is_named(guarded: Guarded, tmp_path: Path) -> None:
    answer = Commands(guarded.server.uri_without_user, guarded.db_name, tmp_path)("status")
    assert answer.code == 3
    assert "refuses" in answer.err and "authentication" in answer.err and answer.err.count("\n") == 1, answer.err


@pytest.mark.parametrize(
    "uri",
    ["mongodb://user:p@ss/w0rdy@127.0.0.1/", "mongodb://user:w0rdy@127.0.0.1:port/", "mongo://u:w0rdy@127.0.0.1/"],
)
def test_an_address_that_cannot_be_read_stops_the_start(uri: str, tmp_path: Path) -> None:
    for command in (["status"], ["run"]):
        answer = Commands(uri, "unused", tmp_path)(*command)
        assert answer.code == 2
        assert answer.err.startswith("error: SUPERVISOR_MONGO_URI: ") and answer.err.count("\n") == 1, answer.err
        assert "w0rdy" not in answer.err


def test_the_api_raises_without_the_password(guarded: Guarded) -> None:
    with (
        JobManager(guarded.server.uri_of("reader", WRONG, source=guarded.db_name), guarded.db_name) as manager,
        pytest.raises(StoreUnavailable, match="refuses") as refused,
    ):
        manager.get_job("x")
    assert "wr0ng" not in str(refused.value)


def test_a_supervisor_whose_rights_are_late_waits_for_them(guarded: Guarded, tmp_path: Path) -> None:
    """Roles are changed while supervisors run: one that is refused says so in its log and to its probes, and waits."""
    with MongoClient[dict[str, Any]](guarded.server.uri) as client:
        admin = client[guarded.db_name]
        admin.command("createUser", "late", pwd=PASSWORDS["supervisor"], roles=["reader"])
        uri = guarded.server.uri_of("late", PASSWORDS["supervisor"], source=guarded.db_name)
        with running_supervisor(tmp_path, uri, guarded.db_name, ready=False) as supervisor:
            for _ in range(2):
                wait_until(lambda: "refuses" in supervisor.get("/readyz")[1], what=lambda: supervisor.get("/readyz")[1])
                assert supervisor.get("/readyz")[0] == 503
                assert supervisor.get("/healthz")[0] == 200, "a restart would not help"
                wait_until(lambda: "mongodb_lost" in supervisor.log(), what=lambda: f"a line: {supervisor.log()}")
                for _ in range(20):  # what has nothing to do meanwhile does not make it ready
                    assert supervisor.get("/readyz")[0] == 503
                    time.sleep(0.1)
                without_secrets(supervisor.get("/readyz")[1])
                admin.command("grantRolesToUser", "late", roles=["supervisor"])
                supervisor.wait_idle(2)
                admin.command("revokeRolesFromUser", "late", roles=["supervisor"])
            without_secrets(supervisor.log())


def test_nobody_sees_the_password(guarded: Guarded, tmp_path: Path) -> None:
    """Not the log, a command line, a job's environment, what commands print, nor HTTP, nor a file."""
    with (
        JobManager(guarded.server.uri, guarded.db_name) as admin,
        running_supervisor(
            tmp_path, guarded.uri("supervisor"), guarded.db_name, log_level="debug", data_dir=tmp_path / "data"
        ) as supervisor,
    ):
        jobs = Jobs(tmp_path, admin)
        for start_method in ("warm", "exec"):
            done = jobs.run(READS_EVERYTHING, start_method=start_method)
            assert done["status"] == "completed", done
            seen = without_secrets(jobs.output(done["_id"]).decode())
            assert not [name for name in json.loads(seen)["os.environ"] if name.startswith("SUPERVISOR_")]
        held = jobs.gated()
        held.wait_started()
        supervisor._report()
        for process in supervisor.everything():
            without_secrets(" ".join(process.cmdline()))
        _assert_jobs_side_is_clean(supervisor)
        reader = Commands(guarded.uri("reader"), guarded.db_name, tmp_path)
        for command in (["status"], ["status", "--json"], ["doctor"], ["doctor", "--json"], ["jobs", "show", held.id]):
            answer = reader(*command)
            without_secrets(answer.out + answer.err)
        for path in ("/metrics", "/healthz", "/readyz"):
            without_secrets(supervisor.get(path)[1])
        held.finish("completed")
        with MongoClient[dict[str, Any]](guarded.server.uri) as client:
            database = client[guarded.db_name]
            for name in database.list_collection_names():
                without_secrets(str(list(database[name].find())))
    for path in (*tmp_path.rglob("*.log"), *(tmp_path / "data").rglob("*")):
        if path.is_file():
            without_secrets(path.read_text("utf-8", "replace"))


def _assert_jobs_side_is_clean(supervisor: RunningSupervisor) -> None:
    """The warm interpreter, the runners and the jobs have never had it: not as a variable, not in their memory."""
    secret = PASSWORDS["supervisor"].split("+")[1].split("@")[0].encode()
    pids = {supervisor.warm_interpreter(), *supervisor.runners()}
    jobs_side = {*pids, *(child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True))}
    for pid in jobs_side:
        assert secret not in Path(f"/proc/{pid}/environ").read_bytes()
        assert not _memory_holds(pid, secret), f"process {pid} has the password in its memory"
    workers = supervisor.workers()
    assert any(_memory_holds(pid, secret) for pid in workers), "the search finds nothing where it is"


def _memory_holds(pid: int, secret: bytes) -> bool:
    """Looks through the writable memory of a process."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, permissions, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if permissions.startswith("rw") and end - start < 1 << 28:
                try:
                    memory.seek(start)
                    if secret in memory.read(end - start):
                        return True
                except OSError:
                    continue
    return False


# -- a MongoDB that comes and goes ------------------------------------------------------------------------------------


@contextmanager
def flapping(uri: str, times: int, seconds: float) -> Iterator[None]:
    """Closes the connections of supervisors for so many seconds, again and again."""
    commands = ["find", "findAndModify", "update", "aggregate", "getMore", "count", "distinct"]
    with MongoClient[dict[str, Any]](uri) as client:
        for _ in range(times):
            for app in ("keeper", "worker"):
                data = {"failCommands": commands, "closeConnection": True, "appName": f"mongo-job-supervisor {app}"}
                client.admin.command("configureFailPoint", "failCommand", mode="alwaysOn", data=data)
                time.sleep(seconds / 2)
            client.admin.command("configureFailPoint", "failCommand", mode="off")
            time.sleep(seconds)
    yield


def test_a_flapping_mongodb_does_not_flood_the_log(guarded: Guarded, tmp_path: Path) -> None:
    with (
        JobManager(guarded.server.uri, guarded.db_name) as admin,
        running_supervisor(
            tmp_path, guarded.uri("supervisor"), guarded.db_name, poll_interval=0.1, lease_seconds=2, log_format="json"
        ) as supervisor,
    ):
        jobs = Jobs(tmp_path, admin)
        with flapping(guarded.server.uri, times=24, seconds=0.4):
            pass
        supervisor.wait_idle(2)
        log = without_secrets(supervisor.log())
        assert jobs.run("pass")["status"] == "completed"
    lines = [json.loads(line) for line in log.splitlines()]
    counts = collections.Counter(line["event"] for line in lines)
    assert max(counts.values()) == REPEATS_PER_MINUTE, counts
    assert counts["mongodb_lost"] >= 3, "it flapped"


def test_a_hanging_mongodb_is_one_line(guarded: Guarded, tmp_path: Path) -> None:
    """SIGSTOP: connections stay, answers do not come. The job that runs goes on, and its result is not lost."""
    with (
        JobManager(guarded.server.uri, guarded.db_name) as admin,
        running_supervisor(
            tmp_path, guarded.uri("supervisor"), guarded.db_name, poll_interval=0.5, lease_seconds=60
        ) as supervisor,
    ):
        held = Jobs(tmp_path, admin).gated()
        held.wait_started()
        guarded.server.pause()
        try:
            held.let_go()
            began = time.monotonic()
            wait_until(lambda: supervisor.get("/readyz")[0] == 503, timeout=60, what="the supervisor to notice")
            assert supervisor.get("/healthz")[0] == 200
            noticed = time.monotonic() - began
            assert noticed < 45
        finally:
            guarded.server.resume()
        done = held.jobs.wait(held.id, "completed", timeout=60)
        assert done["attempts"] == 1
        wait_until(supervisor.is_ready, timeout=60)
        log = without_secrets(supervisor.log())
        assert log.count(" mongodb_lost ") <= 2 and len(log.splitlines()) < 40, log
