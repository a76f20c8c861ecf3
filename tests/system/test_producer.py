"""The producer, as a process, on a real MongoDB."""

from __future__ import annotations

import json
import shutil
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
from tests.support.commands import CHECKOUT, Answer, Commands


@pytest.fixture
def manager(mongo_uri: str, db_name: str) -> Iterator[JobManager]:
    with JobManager(mongo_uri, db_name) as jobs:
        yield jobs


@pytest.fixture
def producer(mongo_uri: str, db_name: str, tmp_path: Path) -> Commands:
    (tmp_path / "job.py").touch()
    return Commands(mongo_uri, db_name, tmp_path)


def all_jobs(manager: JobManager) -> list[dict[str, Any]]:
    return list(manager.jobs.collection.find().sort("_id", 1))


def run_next(manager: JobManager, outcome: Outcome, status: Status, output: bytes = b"") -> None:
    """Runs the next job, as a worker would."""
    document = manager.find_and_lock_job()
    assert document is not None
    key, token = document["_id"], document["lock"]["token"]
    manager.output.append(key, document["attempts"], [Chunk(0, "stdout", 0, output)] if output else [])
    move = transitions.finish(key, token, outcome, Verdict(status=status), attempt=1, details={}, lines=[])
    assert manager.jobs.apply(move, "finish")


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo_inserts_three_jobs(producer: Commands, manager: JobManager) -> None:
    before = datetime.now(UTC)
    answer = producer.producer("demo")
    assert (answer.code, answer.err) == (0, "")
    now, later, perhaps = all_jobs(manager)
    assert answer.out.split() == [str(job["_id"]) for job in (now, later, perhaps)]
    assert timedelta(seconds=58) < later["scheduled_date"] - before < timedelta(seconds=90)
    assert now["scheduled_date"] - before < timedelta(seconds=30)
    assert {job["python_path"] for job in (now, later, perhaps)} == {str(CHECKOUT / "tasks" / "sample_task.py")}
    assert "--fail-rate" in now["python_args"]
    assert "--fail-rate" not in perhaps["python_args"]


def test_demo_names_a_delay_that_is_too_long(producer: Commands) -> None:
    answer = producer.producer("demo", "--delay", "9999999999999d")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "error: argument --delay: is too far in the future\n"


def test_demo_prefers_the_tasks_of_the_working_directory(producer: Commands, manager: JobManager) -> None:
    (producer.directory / "tasks").mkdir()
    own = shutil.copy(CHECKOUT / "tasks" / "sample_task.py", producer.directory / "tasks")
    answer = producer.producer("demo", "--delay", "1s", "--seconds", "0.1", "--json")
    assert [document["request_name"] for document in answer.documents] == [
        "immediate sample", "scheduled sample", "sample that may fail",
    ]  # fmt: skip
    jobs = all_jobs(manager)
    assert {job["python_path"] for job in jobs} == {str(own)}
    assert all(job["python_args"][-2:] == ["--seconds", "0.1"] for job in jobs)


def test_demo_says_what_to_do_where_there_is_no_checkout(
    producer: Commands, manager: JobManager, tmp_path: Path
) -> None:
    installed = shutil.copytree(CHECKOUT / "supervisor", tmp_path / "installed" / "supervisor")
    answer = producer.producer("demo", environment={"PYTHONPATH": str(installed.parent)})
    assert (answer.code, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert f"error: there is no tasks/sample_task.py in {producer.directory}: run the demo in a checkout" in answer.err
    assert "python -m supervisor.producer submit SCRIPT" in answer.err
    assert all_jobs(manager) == []


# -- submit -----------------------------------------------------------------------------------------------------------


def submitted(manager: JobManager, answer: Answer) -> dict[str, Any]:
    assert answer.code == 0, answer.err
    assert answer.out.count("\n") == 1
    return manager.get_job(answer.out.strip())


def test_submit_prints_only_the_id(producer: Commands, manager: JobManager) -> None:
    answer = producer.producer("submit", "job.py")
    job = submitted(manager, answer)
    assert answer.err == ""
    assert job["python_path"] == str(producer.directory / "job.py")
    assert (job["request_name"], job["python_args"], job["required_memory"]) == ("job.py", [], 128)
    assert (job["status"], job["queue"], job["priority"]) == ("pending", "default", 0)


def test_submit_takes_every_field(producer: Commands, manager: JobManager) -> None:
    options = [
        "--name", "a report", "--memory", "64", "--at", "2031-02-03T04:05:06", "--queue", "slow", "--priority", "-5",
        "--timeout", "2m", "--max-attempts", "3", "--retry-delay", "10", "--unique-key", "one", "--env", "A=b=c",
        "--env", "EMPTY=", "--cwd", ".", "--tag", "red", "--tag", "blue", "--start-method", "exec",
        "--memory-warning", "--memory-growth", "1.5", "--max-memory", "256",
    ]  # fmt: skip
    job = submitted(manager, producer.producer("submit", *options, "job.py", "arg"))
    expected = {
        "request_name": "a report", "python_args": ["arg"], "required_memory": 64, "queue": "slow", "priority": -5,
        "scheduled_date": datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC), "timeout": 120.0, "max_attempts": 3,
        "retry_delay": 10.0, "unique_key": "one", "env": {"A": "b=c", "EMPTY": ""}, "cwd": str(producer.directory),
        "tags": ["red", "blue"], "start_method": "exec", "memory_warning": True, "memory_growth": 1.5,
        "max_memory": 256,
    }  # fmt: skip
    assert {name: job[name] for name in expected} == expected


def test_submit_in_a_while(producer: Commands, manager: JobManager) -> None:
    before = datetime.now(UTC)
    job = submitted(manager, producer.producer("submit", "--in", "1h30m", "job.py"))
    assert timedelta(minutes=89) < job["scheduled_date"] - before < timedelta(minutes=91)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--name", "not ours"], ["--json"], ["-x", "--help"], ["--", "a"], ["a", "--", "-b"], ["", "ä b"],
        ["--memory=1"],
    ],
)  # fmt: skip
def test_submit_passes_arguments_on_as_they_are(producer: Commands, manager: JobManager, arguments: list[str]) -> None:
    job = submitted(manager, producer.producer("submit", "--queue", "q", "job.py", *arguments))
    assert job["python_args"] == arguments
    assert job["request_name"] == "job.py"


def test_submit_takes_a_script_that_looks_like_an_option(producer: Commands, manager: JobManager) -> None:
    (producer.directory / "-job.py").touch()
    job = submitted(manager, producer.producer("submit", "--tag", "t", "--", "-job.py", "-x"))
    assert (job["python_path"], job["python_args"]) == (str(producer.directory / "-job.py"), ["-x"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SCRIPT"),
        (["--bogus", "job.py"], "--bogus"),
        (["--memory", "-1", "job.py"], "--memory"),
        (["--memory", "lots", "job.py"], "--memory"),
        (["--memory", "9" * 20, "job.py"], "--memory"),
        *(([option, "", "job.py"], option) for option in ("--name", "--queue", "--unique-key", "--tag")),
        (["--tag", "\udcff", "job.py"], "--tag"),
        (["--memory", "auto", "\udcff.py"], "SCRIPT"),
        (["--priority", "high", "job.py"], "--priority"),
        (["--timeout", "0", "job.py"], "timeout"),
        (["--at", "tomorrow", "job.py"], "--at"),
        (["--at", "0001-01-01T00:00:00+05:00", "job.py"], "--at"),
        (["--in", "5 parsecs", "job.py"], "--in"),
        (["--in", "9999999999999d", "job.py"], "--in"),
        (["--in", "5s", "--at", "2030-01-01", "job.py"], "--in"),
        (["--env", "NOVALUE", "job.py"], "--env"),
        (["--start-method", "cold", "job.py"], "--start-method"),
        (["--memory-growth", "0.5", "job.py"], "memory_growth"),
        (["--memory-growth", "2", "job.py"], "max_memory: is missing"),
        (["--memory", "64", "--max-memory", "32", "job.py"], "max_memory: is 32 MB, less than the 64 MB"),
        (["--priority", "99999999999999999999", "job.py"], "priority"),
        ([""], "SCRIPT"),
        (["--"], "SCRIPT"),
    ],
)
def test_submit_names_the_option_that_is_wrong(
    producer: Commands, manager: JobManager, arguments: list[str], words: str
) -> None:
    answer = producer.producer("submit", *arguments)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith("error: ")
    assert words in answer.err
    assert all_jobs(manager) == []


def test_submit_refuses_a_key_that_is_taken(producer: Commands, manager: JobManager) -> None:
    first = submitted(manager, producer.producer("submit", "--unique-key", "one", "job.py"))
    answer = producer.producer("submit", "--unique-key", "one", "job.py")
    assert (answer.code, answer.out) == (1, "")
    assert str(first["_id"]) in answer.err
    answer = producer.producer("submit", "--json", "--unique-key", "one", "job.py")
    assert (answer.code, answer.err) == (1, f"error: {answer.document['error']}\n")
    assert str(first["_id"]) in answer.document["error"]


def test_submit_warns_of_a_script_that_is_not_there(producer: Commands, manager: JobManager) -> None:
    answer = producer.producer("submit", "elsewhere.py")
    submitted(manager, answer)
    assert answer.err == f"warning: there is no file {producer.directory / 'elsewhere.py'} on this host\n"


def test_submit_takes_the_memory_that_earlier_runs_recommend(producer: Commands, manager: JobManager) -> None:
    first = producer.producer("submit", "--memory", "auto", "job.py")
    assert submitted(manager, first)["required_memory"] == 128
    assert "128 MB (default: no finished run" in first.err
    for _ in range(5):
        manager.create_job("job", str(producer.directory / "job.py"), required_memory=512)
        run_next(manager, Outcome(exit_code=0, peak_memory_mb=100), Status.COMPLETED)
    run_next(manager, Outcome(exit_code=0, peak_memory_mb=100), Status.COMPLETED)
    answer = producer.producer("submit", "--memory", "auto", "job.py")
    assert submitted(manager, answer)["required_memory"] == 128
    assert "128 MB (6 runs used 100 MB at most" in answer.err
    document = producer.producer("submit", "--memory", "auto", "--json", "job.py").document
    assert document["required_memory"] == 128
    assert "6 runs used 100 MB" in document["required_memory_source"]


def test_submit_waits_for_success(producer: Commands, manager: JobManager) -> None:
    process = producer.start("submit", "--wait", "job.py", module="supervisor.producer")
    assert process.stdout is not None
    job_id = process.stdout.readline().decode().strip()
    lines = b"".join(b"line %d\n" % number for number in range(30))
    run_next(manager, Outcome(exit_code=0), Status.COMPLETED, lines)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"line 10\nline 11\n")
    assert out.splitlines()[-1].startswith(b"completed after ")
    assert manager.get_job(job_id)["status"] == "completed"


def test_submit_waits_for_failure(producer: Commands, manager: JobManager) -> None:
    process = producer.start("submit", "--wait", "--json", "job.py", module="supervisor.producer")
    assert process.stdout is not None
    created = json.loads(process.stdout.readline())
    failure = Outcome(exit_code=3, reason=Reason.EXIT_CODE, error="exited with code 3")
    run_next(manager, failure, Status.FAILED, b"output\n")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")
    ended = json.loads(out)
    assert (ended["id"], ended["status"], ended["exit_code"]) == (created["id"], "failed", 3)


# -- import -----------------------------------------------------------------------------------------------------------


def write(producer: Commands, name: str, *lines: dict[str, Any] | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (producer.directory / name).write_text("\n".join(texts) + "\n")


def test_imports_json_lines(producer: Commands, manager: JobManager) -> None:
    lines = [{"python_path": "job.py", "request_name": f"job {n}", "python_args": [str(n)]} for n in range(2500)]
    write(producer, "jobs.jsonl", *lines)
    answer = producer.producer("import", "jobs.jsonl")
    assert (answer.code, answer.out, answer.err) == (0, "2,500 jobs inserted, 0 refused\n", "")
    jobs = all_jobs(manager)
    assert [job["request_name"] for job in jobs] == [f"job {n}" for n in range(2500)]
    assert {job["python_path"] for job in jobs} == {str(producer.directory / "job.py")}
    assert {job["status"] for job in jobs} == {"pending"}


def test_imports_csv_from_standard_input(producer: Commands, manager: JobManager) -> None:
    data = b"python_path,python_args,required_memory\njob.py,--a 1,64\n/t/b.py,,\n"
    answer = producer.producer("import", "-", "--format", "csv", "--json", stdin=data)
    assert answer.code == 0
    assert answer.document == {"inserted": 2, "refused": 0, "errors": []}
    a, b = all_jobs(manager)
    assert (a["python_args"], a["required_memory"]) == (["--a", "1"], 64)
    assert (b["python_path"], b["required_memory"]) == ("/t/b.py", 128)


BAD = [
    {"python_path": "a.py"},
    "{",
    {"python_path": "b.py", "required_memory": "lots"},
    {"python_path": "c.py", "colour": "red"},
    {"python_path": "d.py", "self": 1},
    {"python_path": "e.py", "python_args": ["\u0000"]},
    {"python_path": "e.py", "memory_growth": 2},
    {"python_path": "g.py", "scheduled_date": "0001-01-01T00:00:00+05:00"},
    {"python_path": "f.py"},
]


def test_names_every_line_that_is_wrong(producer: Commands, manager: JobManager) -> None:
    write(producer, "jobs.jsonl", *BAD)
    answer = producer.producer("import", "jobs.jsonl")
    assert (answer.code, answer.out) == (1, "2 jobs inserted, 7 refused\n")
    lines = answer.err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["jobs.jsonl:2", "document"],
        ["jobs.jsonl:3", "required_memory"],
        ["jobs.jsonl:4", "colour"],
        ["jobs.jsonl:5", "self"],
        ["jobs.jsonl:6", "python_args.0"],
        ["jobs.jsonl:7", "max_memory"],
        ["jobs.jsonl:8", "scheduled_date"],
    ]
    assert [job["request_name"] for job in all_jobs(manager)] == ["a.py", "f.py"]


def test_imports_what_was_exported(producer: Commands, manager: JobManager) -> None:
    manager.create_job("job", "/t/a.py", ["x"], max_attempts=2, env={"A": "b"}, retry_delay=0)
    failed = Outcome(exit_code=1, reason=Reason.EXIT_CODE, error="exited with code 1", peak_memory_mb=3)
    run_next(manager, failed, Status.PENDING, b"output\n")
    (before,) = all_jobs(manager)
    exported = producer("jobs", "show", str(before["_id"]), "--json").out
    manager.jobs.collection.delete_many({})
    answer = producer.producer("import", "-", stdin=exported.encode())
    assert (answer.code, answer.out, answer.err) == (0, "1 job inserted, 0 refused\n", "")
    (after,) = all_jobs(manager)
    kept = {name: before[name] for name in ("request_name", "python_path", "python_args", "env", "created_at")}
    assert {name: after[name] for name in kept} == kept
    assert after["status"] == "pending"
    assert not {"attempts", "error", "lock", "peak_memory"} & set(after)
    run_next(manager, Outcome(exit_code=0), Status.COMPLETED)
    exported = producer("jobs", "list", "--json").out
    answer = producer.producer("import", "-", stdin=exported.encode())
    assert (answer.code, answer.out) == (1, "0 jobs inserted, 1 refused\n")
    assert answer.err == "stdin:1: status: is 'completed': only a pending job can be imported\n"


def test_strict_reads_a_pipe_that_has_a_name(producer: Commands, manager: JobManager) -> None:
    for data, code in ((b'{"python_path": "a.py"}\n', 0), (b'{"python_path": "b.py"}\n{', 1)):
        answer = producer.producer("import", "/dev/stdin", "--format", "jsonl", "--strict", stdin=data)
        assert (answer.code, "UnsupportedOperation" in answer.err) == (code, False)
    assert [job["request_name"] for job in all_jobs(manager)] == ["a.py"]


def test_names_the_file_that_cannot_be_read(producer: Commands) -> None:
    answer = producer.producer("import", "/proc/self/mem", "--format", "jsonl")
    assert (answer.code, answer.out) == (1, "0 jobs inserted, 1 refused\n")
    assert answer.err == "/proc/self/mem:1: document: cannot be read: Input/output error\n"


@pytest.mark.parametrize("options", [[], ["--strict"]])
def test_says_that_standard_input_is_closed(producer: Commands, options: list[str]) -> None:
    program = 'exec "$0" -m supervisor.producer import - "$@" <&-'
    answer = subprocess.run(
        ["sh", "-c", program, sys.executable, *options],
        capture_output=True, text=True, cwd=producer.directory, env=producer.environment, timeout=60,
    )  # fmt: skip
    assert (answer.returncode, answer.stdout, answer.stderr) == (2, "", "error: standard input is closed\n")


def test_a_file_without_jobs_is_no_error(producer: Commands) -> None:
    (producer.directory / "jobs.csv").write_text("python_path\n")
    answer = producer.producer("import", "jobs.csv")
    assert (answer.code, answer.out, answer.err) == (0, "0 jobs inserted, 0 refused\n", "")


@pytest.mark.parametrize("name", ["jobs.jsonl", "-"])
def test_strict_inserts_nothing_if_a_line_is_wrong(producer: Commands, manager: JobManager, name: str) -> None:
    write(producer, "jobs.jsonl", *BAD)
    data = (producer.directory / "jobs.jsonl").read_bytes() if name == "-" else b""
    answer = producer.producer("import", name, "--strict", stdin=data)
    assert (answer.code, answer.out) == (1, "0 jobs inserted, 7 refused: nothing was inserted (--strict)\n")
    assert all_jobs(manager) == []
    write(producer, "jobs.jsonl", BAD[0], BAD[-1])
    data = (producer.directory / "jobs.jsonl").read_bytes() if name == "-" else b""
    assert producer.producer("import", name, "--strict", stdin=data).code == 0
    assert len(all_jobs(manager)) == 2


def test_names_the_line_whose_unique_key_is_taken(producer: Commands, manager: JobManager) -> None:
    holder = manager.create_job("holder", "/t/a.py", unique_key="a")
    keys = ["b", "a", "c", "b", "d"]
    write(producer, "jobs.jsonl", *({"python_path": "x.py", "unique_key": key} for key in keys))
    answer = producer.producer("import", "jobs.jsonl")
    assert (answer.code, answer.out) == (1, "3 jobs inserted, 2 refused\n")
    second, fourth = sorted(answer.err.splitlines())
    assert second == f"jobs.jsonl:2: unique_key: 'a' is taken by a pending or running job (job {holder})"
    assert fourth.startswith("jobs.jsonl:4: unique_key: 'b' is taken")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nothing.csv"], "No such file"), (["."], "."), (["jobs.txt"], "--format"), ([], "FILE")],
)
def test_import_says_what_is_wrong_with_its_use(producer: Commands, arguments: list[str], words: str) -> None:
    answer = producer.producer("import", *arguments)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert words in answer.err
