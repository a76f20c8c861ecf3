"""The commands, as processes, on a real MongoDB, without a supervisor: every state is made by hand."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from supervisor.job import Outcome, Verdict
from supervisor.manager import JobManager
from supervisor.output import Chunk
from supervisor.states import Reason, Status
from supervisor.store import transitions
from supervisor.store.supervisors import Identity
from tests.support.commands import CHECKOUT, Commands

COMPLETED = (Outcome(exit_code=0, peak_memory_mb=30), Verdict(status=Status.COMPLETED))
FAILED = (
    Outcome(exit_code=1, reason=Reason.EXIT_CODE, error="exited with code 1", peak_memory_mb=30),
    Verdict(status=Status.FAILED, counter="failures"),
)
KILLED = (
    Outcome(exit_code=-9, reason=Reason.MEMORY_EXCEEDED, error="used 70 MB of the 64 MB", peak_memory_mb=70),
    Verdict(status=Status.FAILED, counter="failures"),
)
FACTS = {
    "version": "1.0.0", "queues": [], "workers": 2, "idle": 2, "busy": 0, "starting": 0, "phase": "running",
    "budget_mb": 1000, "reserved_mb": 0, "used_mb": 40, "problems": [], "paused": None, "jobs": [],
}  # fmt: skip


@pytest.fixture
def manager(mongo_uri: str, db_name: str) -> Iterator[JobManager]:
    with JobManager(mongo_uri, db_name) as jobs:
        yield jobs


@pytest.fixture
def command(mongo_uri: str, db_name: str, tmp_path: Path) -> Commands:
    return Commands(mongo_uri, db_name, tmp_path)


def claimed(manager: JobManager) -> tuple[Any, str]:
    """The `_id` and token of the next job, which runs from now on."""
    document = manager.find_and_lock_job()
    assert document is not None
    return document["_id"], document["lock"]["token"]


def finish(manager: JobManager, key: Any, token: str, result: tuple[Outcome, Verdict]) -> None:
    outcome, verdict = result
    move = transitions.finish(key, token, outcome, verdict, attempt=1, details={}, lines=["ended"])
    assert manager.jobs.apply(move, "finish")


def ended_job(manager: JobManager, result: tuple[Outcome, Verdict] = COMPLETED, **fields: Any) -> str:
    fields = {"request_name": "job", "python_path": "/tasks/job.py", **fields}
    job_id = manager.create_job(**fields)
    finish(manager, *claimed(manager), result)
    return job_id


def register(manager: JobManager, **facts: Any) -> str:
    """Lets the manager, which claims the jobs here, appear as a supervisor; returns its id."""
    name = manager._owner.supervisor_id
    manager.supervisors.register(Identity.of_process(name, "alpha", os.getpid()), {**FACTS, **facts})
    return name


# -- every command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["jobs", "show", "nope"], 1, "there is no job nope"),
        (["jobs", "explain", "nope"], 1, "there is no job nope"),
        (["jobs", "logs", "nope"], 1, "there is no job nope"),
        (["jobs", "cancel", "nope"], 1, "there is no job nope"),
        (["jobs", "retry", "nope"], 1, "there is no job nope"),
        (["jobs", "wait", "nope"], 1, "there is no job nope"),
        (["jobs"], 2, "ACTION"),
        (["jobs", "frobnicate"], 2, "frobnicate"),
        (["frobnicate"], 2, "frobnicate"),
        (["jobs", "list", "--limit", "0"], 2, "--limit"),
        (["jobs", "list", "--limit", "99999999999999999999"], 2, "--limit"),
        (["jobs", "list", "--limit", "9" * 5000], 2, "--limit"),
        (["jobs", "list", "--queue", "\udcff"], 2, "--queue: '\\udcff' is not valid UTF-8"),
        (["jobs", "list", "--name", "\udcff"], 2, "--name"),
        (["jobs", "list", "--tag", "\udcff"], 2, "--tag"),
        (["jobs", "list", "--script", "\udcff"], 2, "--script"),
        *((["jobs", name, "\udcff"], 2, "ID: ") for name in ("show", "explain", "logs", "cancel", "retry", "wait")),
        (["jobs", "memory", "--script", "\udcff"], 2, "--script"),
        (["jobs", "list", "--status", ""], 2, "--status"),
        (["jobs", "list", "--status", ","], 2, "--status"),
        (["jobs", "list", "--status", "done"], 2, "--status"),
        (["jobs", "list", "--since", "yesterday"], 2, "--since"),
        (["jobs", "list", "--since", "0001-01-01T00:00:00+05:00"], 2, "--since"),
        (["jobs", "list", "--until", "9999999999999d"], 2, "--until"),
        (["jobs", "list", "--statu", "failed"], 2, "--statu"),
        (["jobs", "wait", "x", "--timeout", "soon"], 2, "--timeout"),
        (["jobs", "retry"], 2, "--all"),
        (["jobs", "retry", "x", "--all"], 2, "--all"),
        (["jobs", "retry", "--all", "--status", "running"], 2, "--status"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(command: Commands, arguments: list[str], code: int, words: str) -> None:
    answer = command(*arguments)
    assert answer.code == code
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert words in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("action", ["show", "explain", "logs", "cancel", "retry", "wait"])
def test_with_json_an_error_is_an_answer_too(command: Commands, action: str) -> None:
    answer = command("jobs", action, "nope", "--json")
    assert (answer.code, answer.document["error"]) == (1, "there is no job nope")
    assert answer.err == "error: there is no job nope\n"


def test_json_may_stand_before_the_command(command: Commands, manager: JobManager) -> None:
    job_id = manager.create_job("job", "/tasks/job.py")
    assert command("--json", "jobs", "list").document["id"] == job_id
    assert command("jobs", "list", "--json").document["id"] == job_id
    assert command("--json", "status").document["jobs"]["pending"] == 1


@pytest.mark.parametrize("arguments", [["--json"], ["run", "--json"], ["--json", "run"]])
def test_the_supervisor_logs_as_it_is_told(command: Commands, arguments: list[str]) -> None:
    process = command.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        events = (json.loads(line)["event"] for line in process.stdout)
        assert "ready" in events
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("arguments", [["status"], ["jobs", "list"], ["jobs", "show", "x"]])
def test_says_that_mongodb_cannot_be_reached(command: Commands, arguments: list[str]) -> None:
    answer = command(*arguments, environment={"SUPERVISOR_MONGO_URI": "mongodb://user:secret@127.0.0.1:1/"})
    assert answer.code == 3
    assert "cannot be reached" in answer.err
    assert "secret" not in answer.err
    assert (answer.out, answer.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["jobs", "list"], ["status"], ["supervisor.producer", "submit", "job.py"]],
    ids=lambda value: " ".join(value),
)
def test_a_name_that_dns_does_not_know_is_no_wrong_setting(command: Commands, arguments: list[str]) -> None:
    module = arguments.pop(0) if "." in arguments[0] else "supervisor"
    unknown = {"SUPERVISOR_MONGO_URI": "mongodb+srv://bob:secret@nohost.invalid/"}
    answer = command(*arguments, module=module, environment=unknown)
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert (answer.code, len(errors)) == (3, 1), answer.err
    assert "MongoDB at mongodb+srv://***@nohost.invalid/ cannot be reached" in errors[0]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mongodb://127.0.0.1:1/?nonsense=x", "option nonsense: there is no such option"),
        ("mongodb://127.0.0.1:1/?w=1&readPreference=x", "option readPreference: Not a valid read preference"),
        ("mongodb://127.0.0.1:1/?maxPoolSize=many", "option maxPoolSize: The value"),
        ("mongodb://127.0.0.1:1/?tls=true&tls=false", "Duplicate URI option"),
        ("mongodb://127.0.0.1:1/?compressors=zipp", "option compressors: Unsupported compressor"),
        ("mongodb://bob:hid?den=x@127.0.0.1:1/", "user and password must be percent-encoded"),
        ("mongodb+srv://bob:hidden@a..invalid/", ""),
        ("mongodb+srv://bob:hidden@host.invalid:27017/", "port"),
        ("mongodb+srv://bob:hidden@host.invalid/?nonsense=x", "option nonsense"),
    ],
)
def test_an_address_with_a_mistake_is_one_line_that_names_the_setting(command: Commands, uri: str, words: str) -> None:
    for arguments in (["jobs", "list"], ["run"]):
        answer = command(*arguments, environment={"SUPERVISOR_MONGO_URI": uri})
        assert answer.code == 2, answer.err
        assert answer.err.startswith("error: SUPERVISOR_MONGO_URI: ")
        assert words in answer.err
        assert answer.err.count("\n") == 1, "the driver's warnings are not shown, too"
        assert "hid" not in answer.err


def test_a_compressor_that_is_not_installed_is_no_error(command: Commands, mongo_uri: str) -> None:
    wished = f"{mongo_uri}{'&' if '?' in mongo_uri else '?'}compressors=snappy,zstd,zlib"
    answer = command("jobs", "list", "--json", environment={"SUPERVISOR_MONGO_URI": wished})
    assert (answer.code, answer.err) == (0, "")


def test_names_the_setting_that_is_wrong(command: Commands) -> None:
    answer = command("status", environment={"SUPERVISOR_WORKERS": "many"})
    assert answer.code == 2
    assert "SUPERVISOR_WORKERS" in answer.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TASK_ROOTS", "~nosuchuser/x"),
        ("DATA_DIR", "/proc/nothing"),
        ("DATA_DIR", "plain-file"),
        ("PYTHON", "/bin/ls"),
    ],
)
def test_the_supervisor_does_not_start_with_a_setting_that_is_wrong(command: Commands, name: str, value: str) -> None:
    (command.directory / "plain-file").touch()
    answer = command(environment={f"SUPERVISOR_{name}": value, "SUPERVISOR_START_METHOD": "exec"})
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"error: SUPERVISOR_{name}: ")


@pytest.mark.parametrize("module", ["supervisor.cli.main", "supervisor.producer"])
def test_help_needs_neither_the_driver_nor_rich(module: str) -> None:
    program = (
        f"import sys; from {module} import main; code = main(['--help']);"
        "print([name for name in ('pymongo', 'rich', 'pydantic', 'psutil') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ends_quietly_when_nobody_reads(command: Commands, manager: JobManager) -> None:
    manager.create_jobs([_document(f"name {number} " + "x" * 300) for number in range(1000)])
    process = command.start("jobs", "list", "--limit", "1000", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), errors) == (0, b"")


def test_ends_quietly_when_interrupted(command: Commands, manager: JobManager) -> None:
    manager.create_job("job", "/tasks/job.py")
    key, _ = claimed(manager)
    manager.output.append(key, 1, [Chunk(0, "stdout", 0, b"first line\n")])
    process = command.start("jobs", "logs", "-f", str(key))
    assert process.stdout is not None
    assert process.stdout.readline() == b"first line\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


def _document(name: str, **fields: Any) -> dict[str, Any]:
    from supervisor.manager import new_document

    return new_document(name, "/tasks/job.py", **fields)


# -- list and show ----------------------------------------------------------------------------------------------------


def test_lists_the_newest_first(command: Commands, manager: JobManager) -> None:
    first = manager.create_job("first", "/tasks/a.py")
    second = manager.create_job("second", "/tasks/b.py", tags=["red"], queue="slow")
    answer = command("jobs", "list", "--json")
    assert [job["id"] for job in answer.documents] == [second, first]
    assert answer.documents[0]["status"] == "pending"
    assert datetime.fromisoformat(answer.documents[0]["created_at"]).tzinfo is not None
    table = command("jobs", "list")
    assert table.code == 0
    assert [line.split()[0] for line in table.out.splitlines()] == ["ID", second, first]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--status", "failed"], ["bad"]),
        (["--status", "failed,completed"], ["bad", "good"]),
        (["--status", "failed", "--status", "pending"], ["late", "bad"]),
        (["--reason", "exit_code"], ["bad"]),
        (["--queue", "slow"], ["late"]),
        (["--queue", "default"], ["bad", "good"]),
        (["--tag", "red"], ["good"]),
        (["--name", "OO"], ["good"]),
        (["--script", "tasks/l"], ["late"]),
        (["--since", "1h"], ["late", "bad", "good"]),
        (["--until", "1h"], []),
        (["--since", "2100-01-01"], []),
        (["--limit", "1"], ["late"]),
    ],
)
def test_lists_what_the_filters_choose(
    command: Commands, manager: JobManager, options: list[str], names: list[str]
) -> None:
    ended_job(manager, COMPLETED, request_name="good", tags=["red", "blue"])
    ended_job(manager, FAILED, request_name="bad")
    manager.create_job("late", "/tasks/late.py", queue="slow", tags=["blue"])
    assert [job["request_name"] for job in command("jobs", "list", *options, "--json").documents] == names


def test_no_name_can_move_the_cursor(command: Commands, manager: JobManager) -> None:
    job_id = manager.create_job("a\x1b[2Jb\nc", "/tasks/job.py", ["\x1b]0;x\x07"])
    for arguments in (["jobs", "list"], ["jobs", "show", job_id], ["status"]):
        answer = command(*arguments)
        assert answer.code == 0
        assert "\x1b" not in answer.out
    assert "a\\x1b[2Jb\\nc" in command("jobs", "list").out


def test_fits_a_narrow_terminal_with_full_ids(command: Commands, manager: JobManager) -> None:
    ids = [manager.create_job("a rather long name of a job " * 3, "/tasks/job.py") for _ in range(3)]
    coloured = _on_terminal(command, ["jobs", "list"], columns=80)
    assert "\x1b[" in coloured
    uncoloured = _on_terminal(command, ["jobs", "list"], columns=80, NO_COLOR="1")
    assert "\x1b[3" not in uncoloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", uncoloured).splitlines()
    assert all(any(job_id in line for line in lines) for job_id in ids)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["ID", "STATUS", "NAME", "TOOK", "MEMORY", "OUTCOME"]
    wide = _on_terminal(command, ["jobs", "list"], columns=200, NO_COLOR="1")
    assert {"QUEUE", "CREATED", "TRIES"} <= set(re.sub(r"\x1b\[[0-9;]*m", "", wide).splitlines()[0].split())


def _on_terminal(command: Commands, arguments: list[str], *, columns: int, **environment: str) -> str:
    master, slave = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm", **environment}
    process = command.start(*arguments, stdout=slave, stderr=subprocess.DEVNULL, environment=size)
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 60)[0]:
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
    os.close(master)
    assert process.wait(60) == 0
    return shown.decode()


def test_shows_a_job_on_one_page(command: Commands, manager: JobManager) -> None:
    job_id = ended_job(manager, FAILED, request_name="report", python_args=["--year", "2030"], env={"KEY": "secret"})
    answer = command("jobs", "show", job_id)
    assert answer.code == 0
    for words in (
        job_id,
        "report",
        "failed",
        "/tasks/job.py '--year' '2030'",
        "exited with code 1",
        "KEY",
        "] created",
    ):
        assert words in answer.out
    assert "secret" not in answer.out
    document = command("jobs", "show", job_id, "--json").document
    assert (document["id"], document["env"], document["exit_code"]) == (job_id, {"KEY": "secret"}, 1)
    assert len(document["logs"]) == 3


def test_shows_how_the_memory_of_a_job_grew(command: Commands, manager: JobManager) -> None:
    job_id = ended_job(manager)

    def shown(samples: Any) -> list[str]:
        manager.jobs.collection.update_one({}, {"$set": {"memory_samples": samples}})
        lines = command("jobs", "show", job_id).out.splitlines()
        (first,) = [at for at, line in enumerate(lines) if line.startswith("memory_samples")] or [len(lines)]
        return [line for line in lines[first : first + 3] if line.startswith(("memory_samples", " " * 18))]

    assert shown([[0.1, 12], [0.52, 40], [1.2, 97]]) == ["memory_samples    100 ms 12 MB → 520 ms 40 MB → 1.2 s 97 MB"]
    many = shown([[second, 1000 + second] for second in range(63)] + [[63.5, 7]])
    assert max(map(len, many)) <= 80
    text = " ".join(line[18:] for line in many)
    assert text.startswith("0 ms 1000 MB → ") and text.endswith("1 min 2 s 1062 MB → 1 min 4 s 7 MB"), "with the peak"
    assert 5 <= text.count("→") < 8
    assert shown("much") == shown([[1], "x", [1, "y"], [float("nan"), 3]]) == []


def test_survives_documents_of_other_programs(command: Commands, manager: JobManager) -> None:
    manager.jobs.collection.insert_many(
        [
            {
                "_id": 7,
                "status": "pending",
                "python_path": 3,
                "created_at": "yesterday",
                "required_memory": "much",
            },
            {"_id": "named", "status": "running", "updated_at": "today", "lock": "mine", "tags": {"a": 1}},
            {"_id": "odd", "status": "sleeping", "logs": "none", "scheduled_date": float("nan")},
            {"_id": "bare"},
        ]
    )
    assert len(command("jobs", "list", "--json").documents) == 4
    for arguments in (
        ["jobs", "list"],
        ["jobs", "show", "named"],
        ["jobs", "show", "7"],
        ["jobs", "show", "odd"],
    ):
        assert command(*arguments).code == 0
    assert command("jobs", "show", "odd", "--json").document["scheduled_date"] is None
    for job_id in ("7", "named", "odd", "bare"):
        assert command("jobs", "explain", job_id).code == 0
    assert command("status").code == 0
    assert command("status", "--json").document["jobs"]["running"] == 1
    assert command("jobs", "memory").code == 0
    assert command("jobs", "cancel", "7").code == 0
    doctor = command("doctor", "--json")
    levels = {finding["check"]: finding["level"] for finding in doctor.document["findings"]}
    assert (doctor.code, levels["indexes"], levels["statuses"]) == (1, "FAIL", "WARN")


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explains_from_what_is_known(command: Commands, manager: JobManager) -> None:
    manager.create_job("running", "/tasks/job.py", required_memory=200)
    claimed(manager)
    manager.create_job("earlier", "/tasks/job.py")
    waiting = manager.create_job("job", "/tasks/job.py", required_memory=900)
    answer = command("jobs", "explain", waiting)
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    assert "no supervisor is running" in answer.out
    register(manager)
    why = command("jobs", "explain", waiting, "--json").document
    assert (why["why"], why["status"], why["id"]) == ("memory", "pending", waiting)
    assert why["sentence"] == "It waits for memory: 800 of the 900 MB it needs are free on alpha; 1 job comes first."
    claimed(manager)
    busy = command("jobs", "explain", waiting).out
    assert busy == "All 2 workers that could take it are busy.\n"
    later = manager.create_job("later", "/tasks/job.py", scheduled_date=datetime.now(UTC) + timedelta(hours=2))
    assert "It is not due yet: it may run in 2 h" in command("jobs", "explain", later).out


# -- logs -------------------------------------------------------------------------------------------------------------

RAW = b"\xff\x00 caf\xc3\xa9\r\n"


def test_writes_what_the_job_wrote(command: Commands, manager: JobManager) -> None:
    manager.create_job("job", "/tasks/job.py")
    key, _ = claimed(manager)
    chunks = [
        Chunk(0, "stdout", 0, RAW),
        Chunk(1, "stderr", 0, b"oops\n"),
        Chunk(2, "stdout", len(RAW) + 12 * 2**20, b"one\ntwo\nthree\n"),
    ]
    manager.output.append(key, 1, chunks)

    def logs(*options: str) -> bytes:
        process = command.start("jobs", "logs", str(key), *options)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        return out

    gap = "\n[… 12 MB not kept …]\n".encode()
    assert logs() == RAW + b"oops\n" + gap + b"one\ntwo\nthree\n"
    assert logs("--stream", "stderr") == b"oops\n"
    assert logs("--tail", "2") == b"two\nthree\n"
    assert logs("--tail", "4") == b"oops\none\ntwo\nthree\n"
    assert logs("--tail", "1", "--stream", "stderr") == b"oops\n"
    documents = command("jobs", "logs", str(key), "--json").documents
    assert [document["stream"] for document in documents] == ["stdout", "stderr", "stdout"]
    assert documents[0]["text"] == "\ufffd\x00 café\r\n"
    assert documents[2]["missing_bytes"] == 12 * 2**20


def test_shows_the_last_attempt_or_the_one_that_is_named(command: Commands, manager: JobManager) -> None:
    job_id = ended_job(manager, FAILED)
    manager.retry_job(job_id)
    key, _ = claimed(manager)
    manager.output.append(key, 1, [Chunk(0, "stdout", 0, b"first\n")])
    manager.output.append(key, 2, [Chunk(0, "stdout", 0, b"second\n")])
    assert command("jobs", "logs", job_id).out == "second\n"
    assert command("jobs", "logs", job_id, "--attempt", "1").out == "first\n"
    assert "printed nothing (attempt 3)" in command("jobs", "logs", job_id, "--attempt", "3").err


def test_follows_a_job_until_it_has_ended(command: Commands, manager: JobManager) -> None:
    job_id = manager.create_job("job", "/tasks/job.py", max_attempts=2, retry_delay=0)
    process = command.start("jobs", "logs", "-f", job_id)
    assert process.stdout is not None
    try:
        key, token = claimed(manager)
        manager.output.append(key, 1, [Chunk(0, "stdout", 0, b"one\n")])
        assert process.stdout.readline() == b"one\n"
        manager.output.append(key, 1, [Chunk(1, "stdout", 4, b"two\n")])
        assert process.stdout.readline() == b"two\n"
        again = Verdict(status=Status.PENDING, counter="failures", retry_after_seconds=0)
        finish(manager, key, token, (FAILED[0], again))
        key, token = claimed(manager)
        manager.output.append(key, 2, [Chunk(0, "stderr", 0, b"three\n")])
        assert process.stdout.readline() == b"three\n"
        assert process.poll() is None
        manager.output.append(key, 2, [Chunk(1, "stdout", 0, b"last")])
        finish(manager, key, token, COMPLETED)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, b"last", b"")
    finally:
        process.kill()
        process.communicate()


# -- cancel, retry, wait ----------------------------------------------------------------------------------------------


def test_cancels_pending_and_running_jobs(command: Commands, manager: JobManager) -> None:
    running = manager.create_job("running", "/tasks/job.py")
    claimed(manager)
    waiting = manager.create_job("waiting", "/tasks/job.py")
    answer = command("jobs", "cancel", waiting, running, "--json")
    assert answer.code == 0
    assert answer.documents == [
        {"id": waiting, "status": "cancelled", "cancel_requested": False},
        {"id": running, "status": "running", "cancel_requested": True},
    ]
    assert manager.get_job(waiting)["status"] == "cancelled"
    assert manager.get_job(running)["cancel_requested"] is True


def test_one_job_that_cannot_be_cancelled_does_not_stop_the_others(command: Commands, manager: JobManager) -> None:
    ended = ended_job(manager)
    waiting = manager.create_job("waiting", "/tasks/job.py")
    answer = command("jobs", "cancel", ended, waiting)
    assert answer.code == 1
    assert f"error: job {ended} is already completed" in answer.err
    assert manager.get_job(waiting)["status"] == "cancelled"
    again = command("jobs", "cancel", ended, "--json")
    assert again.document == {"id": ended, "error": f"job {ended} is already completed"}


def test_waits_for_the_end_of_what_it_cancels(command: Commands, manager: JobManager) -> None:
    running = manager.create_job("running", "/tasks/job.py")
    key, token = claimed(manager)
    stopped = (
        Outcome(reason=Reason.CANCELLED, error="cancelled on request", exit_code=-15),
        Verdict(status=Status.CANCELLED),
    )
    process = command.start("jobs", "cancel", running, "--wait")
    assert process.stdout is not None
    assert process.stdout.readline() == f"{running} asked to stop\n".encode()
    finish(manager, key, token, stopped)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out == f"{running} cancelled: cancelled on request\n".encode()


def test_retries_finished_jobs(command: Commands, manager: JobManager) -> None:
    failed = ended_job(manager, FAILED)
    waiting = manager.create_job("waiting", "/tasks/job.py")
    answer = command("jobs", "retry", failed, waiting)
    assert answer.code == 1
    assert answer.out == f"{failed} pending\n"
    assert f"job {waiting} is pending" in answer.err
    assert manager.get_job(failed)["status"] == "pending"


def test_retries_what_the_filters_choose(command: Commands, manager: JobManager) -> None:
    failed = [ended_job(manager, FAILED, tags=["red"]) for _ in range(3)]
    other = ended_job(manager, FAILED)
    completed = ended_job(manager, COMPLETED, tags=["red"])
    refused = command("jobs", "retry", "--all", "--tag", "red")
    assert (refused.code, "--yes" in refused.err) == (2, True)
    answer = command("jobs", "retry", "--all", "--tag", "red", "--yes")
    assert (answer.code, answer.out) == (0, "3 jobs chosen\n")
    assert {manager.get_job(job_id)["status"] for job_id in failed} == {"pending"}
    assert manager.get_job(other)["status"] == "failed"
    assert manager.get_job(completed)["status"] == "completed"


def test_a_retry_whose_unique_key_is_taken_is_refused(command: Commands, manager: JobManager) -> None:
    failed = ended_job(manager, FAILED, unique_key="only one")
    holder = manager.create_job("job", "/tasks/job.py", unique_key="only one")
    answer = command("jobs", "retry", failed)
    assert answer.code == 1
    assert f"'only one' is taken by a pending or running job (job {holder})" in answer.err
    assert holder in command("jobs", "explain", failed).out


def test_waits_until_all_have_ended(command: Commands, manager: JobManager) -> None:
    good, bad = ended_job(manager, COMPLETED), ended_job(manager, FAILED)
    assert command("jobs", "wait", good).code == 0
    answer = command("jobs", "wait", good, bad)
    assert answer.code == 1
    assert answer.out == f"{good} completed\n{bad} failed: exited with code 1\n"
    slow = manager.create_job("slow", "/tasks/job.py")
    late = command("jobs", "wait", good, slow, "--timeout", "200ms")
    assert (late.code, "1 job did not end within 200 ms" in late.err) == (1, True)
    late = command("jobs", "wait", good, slow, "--timeout", "200ms", "--json")
    assert (late.code, late.documents[1]) == (1, {"id": slow, "error": "did not end within 200 ms"})
    assert late.err == "error: 1 job did not end within 200 ms\n"
    process = command.start("jobs", "wait", slow, "--json")
    key, token = claimed(manager)
    finish(manager, key, token, COMPLETED)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b'"status": "completed"' in out


# -- memory, status ---------------------------------------------------------------------------------------------------


def test_recommends_memory(command: Commands, manager: JobManager) -> None:
    for _ in range(5):
        ended_job(manager, COMPLETED, python_path="/tasks/light.py", required_memory=512)
    ended_job(manager, KILLED, python_path="/tasks/hog.py", required_memory=64)
    light, hog = command("jobs", "memory", "--json").documents
    assert light["script"] == "/tasks/light.py"
    assert (light["runs"], light["declared"], light["max"], light["recommended"]) == (5, 512, 30, 48)
    assert light["wasted"] == pytest.approx(1 - 30 / 512)
    assert (hog["killed"], hog["recommended"], "killed at 64 MB" in hog["reason"]) == (1, 96, True)
    table = command("jobs", "memory", "--script", "hog").out.splitlines()
    assert len(table) == 2
    assert table[1].startswith("/tasks/hog.py")


def test_growth_hides_no_kill_and_not_what_was_declared(command: Commands, manager: JobManager) -> None:
    job_id = manager.create_job("job", "/tasks/job.py", required_memory=64, memory_growth=2.0, max_memory=256)
    for grown in (128, 256):
        again = Verdict(status=Status.PENDING, retry_after_seconds=0.0, required_memory=grown)
        finish(manager, *claimed(manager), (KILLED[0], again))
    finish(manager, *claimed(manager), (Outcome(exit_code=0, peak_memory_mb=200), Verdict(status=Status.COMPLETED)))
    (found,) = command("jobs", "memory", "--json").documents
    assert (found["runs"], found["killed"], found["declared"], found["max"]) == (1, 2, 64, 200)
    shown = command("jobs", "show", job_id).out
    for name, value in (("required_memory", "256 MB"), ("declared_memory", "64 MB"), ("memory_kills", "2")):
        assert re.search(rf"^{name} +{value}$", shown, re.MULTILINE), name


def test_a_kill_that_another_attempt_made_good_counts(command: Commands, manager: JobManager) -> None:
    manager.create_job("job", "/tasks/job.py", required_memory=64, max_attempts=2)
    again = Verdict(status=Status.PENDING, counter="failures", retry_after_seconds=0.0)
    finish(manager, *claimed(manager), (KILLED[0], again))
    finish(manager, *claimed(manager), COMPLETED)
    (found,) = command("jobs", "memory", "--json").documents
    assert (found["completed"], found["killed"], found["declared"]) == (1, 1, 64)


def test_shows_everything_at_a_glance(command: Commands, manager: JobManager) -> None:
    running = manager.create_job("running", "/tasks/job.py", required_memory=200)
    claimed(manager)
    manager.create_job("waiting", "/tasks/job.py", queue="slow")
    assert "No supervisor is running" in command("status").out
    job = {
        "job_id": running,
        "token": "secret",
        "attempt": 1,
        "worker_pid": 7,
        "memory_mb": 200,
        "used_mb": 40,
    }
    register(manager, jobs=[job], problems=["the disk is full"])
    shown = command("status").out
    for words in (
        "alpha", "2: 1 busy, 1 idle", "200 MB of 1000 MB reserved", "[##", "the disk is full", "1 pending   1 running",
        "slow", running, "40 / 200 MB",
    ):  # fmt: skip
        assert words in shown
    machine = command("status", "--json")
    document = machine.document
    assert document["supervisors"][0]["live"] is True
    assert document["queues"]["slow"]["due"] == 1
    assert document["running"][0]["id"] == running
    assert document["running"][0]["used_memory"] == 40
    assert "secret" not in machine.out


def test_a_supervisor_that_was_not_seen_for_long_is_gone(command: Commands, manager: JobManager) -> None:
    name = register(manager)
    collection = manager.jobs.collection.database["supervisors"]
    collection.update_one({"_id": name}, [{"$set": {"seen_at": {"$subtract": ["$$NOW", 60_000]}}}])
    shown = command("status").out
    assert "No supervisor is running" in shown
    assert "gone" in shown


# -- doctor -----------------------------------------------------------------------------------------------------------


def findings(command: Commands, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    answer = command("doctor", "--json", environment=environment)
    assert answer.document["ok"] is not any(finding["level"] == "FAIL" for finding in answer.document["findings"])
    return answer.code, {finding["check"]: finding for finding in answer.document["findings"]}


def test_finds_nothing_wrong_where_nothing_is(command: Commands, manager: JobManager) -> None:
    manager.create_job("job", "/tasks/job.py")
    register(manager)
    code, found = findings(command)
    assert code == 0
    assert {finding["level"] for finding in found.values()} == {"OK"}
    shown = command("doctor")
    assert (shown.code, "0 failures, 0 warnings" in shown.out) == (0, True)


def test_finds_what_is_wrong_with_the_jobs(command: Commands, manager: JobManager) -> None:
    manager.create_job("stuck", "/tasks/job.py")
    key, _ = claimed(manager)
    manager.jobs.collection.update_one({"_id": key}, {"$set": {"lock.expires_at": datetime(2000, 1, 1, tzinfo=UTC)}})
    manager.create_job("unserved", "/tasks/job.py", queue="slow")
    large = manager.create_job("large", "/tasks/job.py", required_memory=5000)
    register(manager, queues=["default"], paused="the host is short of memory")
    code, found = findings(command)
    assert code == 1
    assert str(key) in found["stuck jobs"]["message"]
    assert "slow (1)" in found["queues"]["message"]
    assert large in found["job sizes"]["message"]
    assert "short of memory" in found["supervisors"]["message"]
    assert {found[check]["level"] for check in ("stuck jobs", "queues", "job sizes")} == {"FAIL"}
    assert all(finding["advice"] for finding in found.values() if finding["level"] != "OK")


def test_finds_why_the_index_of_unique_keys_is_missing(command: Commands, manager: JobManager) -> None:
    manager.create_job("first", "/tasks/job.py", unique_key="nightly")
    manager.jobs.collection.drop_index("unique_key")
    code, found = findings(command)
    assert (code, found["indexes"]["message"]) == (1, "missing: unique_key")
    assert "when a supervisor starts" in found["indexes"]["advice"]
    manager.jobs.collection.insert_one(_document("second", unique_key="nightly"))
    manager.jobs.ensure_indexes()
    code, found = findings(command)
    assert (code, found["indexes"]["level"]) == (1, "FAIL")
    assert "share a unique_key: 'nightly' (2)" in found["indexes"]["message"]
    assert "cancel all but one" in found["indexes"]["advice"]


def test_finds_running_jobs_that_other_programs_left(command: Commands, manager: JobManager) -> None:
    old = datetime.now(UTC) - timedelta(hours=2)
    key = manager.jobs.collection.insert_one({"status": "running", "updated_at": old}).inserted_id
    manager.jobs.collection.insert_one({"status": "running", "updated_at": datetime.now(UTC)})
    _, found = findings(command)
    assert found["stuck jobs"]["level"] == "WARN"
    assert str(key) in found["stuck jobs"]["message"]
    assert "more" not in found["stuck jobs"]["message"]


def test_finds_the_most_wasteful_script(command: Commands, manager: JobManager) -> None:
    for _ in range(5):
        ended_job(manager, COMPLETED, python_path="/tasks/light.py", required_memory=512)
    _, found = findings(command)
    assert "/tasks/light.py declares 512 MB" in found["declared memory"]["message"]
    assert "declare 48 MB" in found["declared memory"]["advice"]


def test_checks_the_configuration_even_without_mongodb(command: Commands) -> None:
    code, found = findings(
        command,
        SUPERVISOR_MONGO_URI="mongodb://127.0.0.1:1/",
        SUPERVISOR_WROKERS="3",
        SUPERVISOR_TASK_ROOTS="/nonexistent",
        SUPERVISOR_PYTHON="/nonexistent/python",
        SUPERVISOR_DATA_DIR="/proc/nothing",
    )
    assert code == 3
    assert "SUPERVISOR_WROKERS" in found["settings"]["message"]
    assert "/nonexistent" in found["task roots"]["message"]
    assert found["interpreter"]["level"] == found["MongoDB"]["level"] == "FAIL"
    _, found = findings(command, SUPERVISOR_TASK_ROOTS="~nosuchuser/x", SUPERVISOR_PYTHON="/bin/ls")
    assert found["task roots"]["level"] == found["interpreter"]["level"] == "FAIL"
    wrong = command("doctor", "--json", environment={"SUPERVISOR_WORKERS": "x"})
    assert (wrong.code, "SUPERVISOR_WORKERS" in wrong.out) == (2, True)
    for options in ([], ["--json"]):
        answer = command("doctor", *options, environment={"SUPERVISOR_MONGO_URI": "mongodb://127.0.0.1:1/"})
        assert (answer.code, answer.err.count("\n")) == (3, 1)
        assert answer.err.startswith("error: ") and "cannot be reached" in answer.err
        answer = command("doctor", *options, environment={"SUPERVISOR_WORKERS": "x"})
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert answer.err.startswith("error: SUPERVISOR_WORKERS: ")


def test_finds_the_other_distribution_of_this_name(command: Commands, tmp_path: Path) -> None:
    metadata = tmp_path / "supervisor-4.3.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: supervisor\nVersion: 4.3.0\n")
    code, found = findings(command, PYTHONPATH=f"{CHECKOUT}:{tmp_path}")
    assert code == 1
    assert "supervisor 4.3.0 (supervisord)" in found["installation"]["message"]
    assert "pip uninstall supervisor" in found["installation"]["advice"]
