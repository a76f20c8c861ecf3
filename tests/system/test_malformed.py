"""Documents that cannot be run: each fails with the name of its field, and the queue moves on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import pytest
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument

from tests.conftest import Shared
from tests.support.running import Document

KB, MB = 1 << 10, 1 << 20
LATER = datetime(2031, 5, 1, tzinfo=UTC)


def run(shared: Shared, **fields: Any) -> Document:
    """The document as it ends, with a valid one behind it, which must end, too."""
    job_id = shared.jobs.insert(**fields)
    behind = shared.jobs.insert()
    assert shared.jobs.wait(behind, timeout=30)["status"] == "completed"
    return shared.jobs.wait(job_id, timeout=30)


def assert_refused(document: Document, field: str, words: str = "") -> None:
    assert (document["status"], document["reason"]) == ("failed", "invalid_job")
    assert document["error"].split(":")[0].split(".")[0] == field, document["error"]
    assert words in document["error"]
    assert len(document["error"]) < 1000
    assert document["exit_code"] is None
    assert "lock" not in document
    assert document["failures"] == 1
    assert any(document["error"] in line for line in document["logs"])


# -- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("request_name", ..., "missing"),
        ("request_name", 5, "valid string"),
        ("request_name", "a\0b", "NUL"),
        ("request_name", "x" * 200_000, "200000 bytes"),
        ("python_path", ..., "missing"),
        ("python_path", None, "missing"),
        ("python_path", "", "at least 1"),
        ("python_path", 5, "valid string"),
        ("python_path", ["a.py"], "valid string"),
        ("python_path", Binary(b"a.py"), "valid string"),
        ("python_path", "a\0.py", "NUL"),
        ("python_path", "x" * 200_000, "200000 bytes"),
        ("python_path", "x" * 5_000, "too long"),
        ("python_path", "/".join(["x"] * 3_000), ""),
        ("python_args", "text", "valid list"),
        ("python_args", 5, "valid list"),
        ("python_args", {"a": "b"}, "valid list"),
        ("python_args", ["a", 5], "valid string"),
        ("python_args", ["a", None], "valid string"),
        ("python_args", ["a\0b"], "NUL"),
        ("python_args", ["x" * 128 * KB], "131072 bytes"),
        ("python_args", ["x" * 100 * KB] * 40, "in all"),
        ("required_memory", "much", "valid integer"),
        ("required_memory", 0, "greater than or equal to 1"),
        ("required_memory", -5, "greater than or equal to 1"),
        ("required_memory", 1.5, "valid integer"),
        ("required_memory", math.nan, "valid integer"),
        ("required_memory", True, "valid integer"),
        ("required_memory", Decimal128("128"), "valid integer"),
        ("required_memory", Decimal128("1e12"), "whole number"),
        ("required_memory", math.inf, "whole number"),
        ("required_memory", 1e30, "whole number"),
        ("required_memory", 9_999_999.5, "whole number"),
        ("required_memory", [9_999_999], "whole number"),
        ("scheduled_date", "tomorrow", "valid datetime"),
        ("scheduled_date", 0, "valid datetime"),
        ("scheduled_date", [], "valid datetime"),
        ("scheduled_date", Timestamp(1, 1), "not a date"),
        ("scheduled_date", Regex("x"), "not a date"),
        ("scheduled_date", MaxKey(), "not a date"),
        ("scheduled_date", MinKey(), "valid datetime"),
        ("queue", 5, "valid string"),
        ("queue", "", "at least 1"),
        ("priority", "high", "valid integer"),
        ("priority", math.inf, "valid integer"),
        ("priority", LATER, "valid integer"),
        ("priority", [1, 2], "valid integer"),
        ("priority", {"high": True}, "valid integer"),
        ("timeout", "soon", "valid number"),
        ("timeout", 0, "greater than 0"),
        ("timeout", math.nan, "finite"),
        ("max_attempts", 0, "greater than or equal to 1"),
        ("max_attempts", "3", "valid integer"),
        ("retry_delay", -1, "greater than or equal to 0"),
        ("retry_delay", math.inf, "finite"),
        ("unique_key", 5, "valid string"),
        ("unique_key", "x" * 1000, "500"),
        ("env", "A=b", "valid dictionary"),
        ("env", {"A": 5}, "valid string"),
        ("env", {"A=B": "c"}, "name of a variable"),
        ("env", {"A": "x\0y"}, "NUL"),
        ("env", {"A": "x" * 128 * KB}, "131072 bytes"),
        ("env", {f"A{n}": "x" * 100 * KB for n in range(30)}, "together with python_args"),
        ("cwd", 5, "valid string"),
        ("cwd", "/no/such/directory", "not a directory"),
        ("cwd", "a\0b", "NUL"),
        ("start_method", "hot", "'warm' or 'exec'"),
        ("tags", "text", "valid list"),
        ("tags", [5], "valid string"),
        ("max_memory", 127, "less than the 128 MB in required_memory"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, str) else value[:20].replace("\0", "NUL"),
)
def test_a_wrong_field_is_named(shared: Shared, field: str, value: Any, words: str) -> None:
    assert_refused(run(shared, **{field: value}), field, words)


def test_growth_without_a_bound_is_refused(shared: Shared) -> None:
    assert_refused(run(shared, memory_growth=2.0), "max_memory", "missing")


# -- the script -----------------------------------------------------------------------------------------------------


def outside(directory: Path) -> str:
    path = directory.parent / "outside.py"
    path.write_text("")
    return str(path)


def link_out_of_the_roots(directory: Path) -> str:
    return str(linked(directory / "link-out.py", outside(directory)))


def way_out_of_the_roots(directory: Path) -> str:
    return f"{directory}/../{Path(outside(directory)).name}"


def link_to_itself(directory: Path) -> str:
    return str(linked(directory / "loop.py", "loop.py"))


def linked(path: Path, target: str) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


def subdirectory(directory: Path) -> str:
    path = directory / "subdirectory"
    path.mkdir(exist_ok=True)
    return str(path)


def fifo(directory: Path) -> str:
    path = directory / "fifo.py"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return str(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda directory: str(directory / "missing.py"), "there is no file"),
        (lambda directory: "missing.py", "there is no file"),
        (lambda directory: str(directory / "no_op.py" / "x.py"), "cannot be read"),
        (subdirectory, "is a directory"),
        (outside, "outside the task roots"),
        (way_out_of_the_roots, "outside the task roots"),
        (link_out_of_the_roots, "outside the task roots"),
        (lambda directory: "/etc/passwd", "outside the task roots"),
        (lambda directory: "/dev/null", "outside the task roots"),
        (link_to_itself, "symbolic link"),
        (fifo, "not a regular file"),
    ],
)
def test_a_script_that_may_not_be_run(shared: Shared, make: Callable[[Path], str], words: str) -> None:
    assert_refused(run(shared, python_path=make(shared.jobs.directory)), "python_path", words)


def test_a_link_within_the_roots_is_fine(shared: Shared) -> None:
    target = shared.jobs.script("import sys; print(sys.argv[0])", "target.py")
    link = linked(shared.jobs.directory / "link.py", str(target))
    document = run(shared, python_path=str(link))
    assert document["status"] == "completed"
    assert shared.jobs.output(document["_id"]) == f"{link}\n".encode()


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x01\x01\0\0", b"no python at all!", b"a = '\xff'", b"x = 1\0"])
def test_what_is_no_python_fails_as_the_interpreter_says(shared: Shared, content: bytes) -> None:
    path = shared.jobs.directory / "no_python.py"
    path.write_bytes(content)
    document = run(shared, python_path=str(path))
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "exit_code", 1)
    assert "Error" in document["error"]


# -- what is unusual but right --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"python_args": [str(n) for n in range(10_000)]},
        {"python_args": ["x" * (128 * KB - 1)]},
        {"python_args": ...},
        {"python_args": None},
        {"required_memory": ...},
        {"required_memory": 128.0},
        {"required_memory": Int64(128)},
        {"scheduled_date": ...},
        {"scheduled_date": None},
        {"created_at": ...},
        {"created_at": "long ago"},
        {"created_at": Timestamp(1, 1)},
        {"updated_at": ...},
        {"status": ...},
        {"status": None},
        {"logs": ...},
        {"logs": "text"},
        {"logs": {"a": 1}},
        {"logs": [5, None, {"a": "$b"}, ["x"]]},
        {"logs": ["x" * 100_000] * 30},
        {"attempts": "many"},
        {"attempts": -5},
        {"attempts": math.nan},
        {"attempts": [1]},
        {"failures": "many", "losses": None, "interruptions": {}},
        {"lock": "text"},
        {"lock": 5},
        {"lock": [1, 2]},
        {"lock": None},
        {"lock": {"token": {"$ne": 1}, "expires_at": "never"}},
        {"priority": Int64(-(2**62))},
        {"priority": 5.0},
        {"cancel_requested": True},
        {"unknown": {"deep": [1, {"a": ObjectId()}]}, "code": Code("x"), "min": MinKey(), "": 1},
        {"with.dot": 1, "request_name": "$status"},
        {"_id": 5},
        {"_id": "text $a"},
        {"_id": {"a": 1, "b": [2]}},
        {"_id": Binary(b"\xff\0")},
        {"_id": LATER},
        {"_id": math.nan},
    ],
    ids=lambda fields: ",".join(f"{name}={str(value)[:16]}" for name, value in fields.items()),
)
def test_what_is_unusual_but_not_wrong_completes(shared: Shared, fields: Document) -> None:
    document = run(shared, **fields)
    assert document["status"] == "completed", document["error"]
    assert document["exit_code"] == 0
    assert isinstance(document["logs"], list)
    assert "lock" not in document
    shared.jobs.collection.delete_one({"_id": document["_id"]})


def test_10_000_arguments_arrive(shared: Shared) -> None:
    script = shared.jobs.script("import sys; print(len(sys.argv), sys.argv[-1])", "count.py")
    document = run(shared, python_path=str(script), python_args=[str(n) for n in range(10_000)])
    assert shared.jobs.output(document["_id"]) == b"10001 9999\n"


def test_a_document_of_15_9_mb_completes_whatever_it_prints(shared: Shared) -> None:
    script = shared.jobs.script("import sys; print('x' * 100_000); print('y' * 100_000, file=sys.stderr)", "loud.py")
    document = run(shared, python_path=str(script), ballast="x" * round(15.9 * MB))
    assert (document["status"], document["attempts"], document["exit_code"]) == ("completed", 1, 0)
    assert len(shared.jobs.output(document["_id"])) == 100_001
    shared.jobs.collection.delete_one({"_id": document["_id"]})


@pytest.mark.parametrize("spare", [0, 100, 400, 700, 1500])
def test_a_document_at_the_limit_of_mongodb_cannot_block_the_queue(shared: Shared, spare: int) -> None:
    fields = {"ballast": "", "python_path": str(shared.jobs.directory / "no_op.py")}
    size = len(bson.encode(plain(fields)))
    document = run(shared, **fields | {"ballast": "x" * (16 * MB - size - spare)})
    assert document["status"] in ("completed", "failed")
    shared.jobs.collection.delete_one({"_id": document["_id"]})


def plain(fields: Document) -> Document:
    now = datetime.now(UTC)
    return {
        "_id": ObjectId(), "request_name": "foreign", "status": "pending", "created_at": now, "updated_at": now,
        "scheduled_date": now, "python_args": [], "required_memory": 128, "logs": [], **fields,
    }  # fmt: skip


def test_dates_that_python_does_not_know(shared: Shared) -> None:
    """Other drivers write years beyond 9999."""
    document = plain({"python_path": str(shared.jobs.directory / "no_op.py")})
    far = bson.datetime_ms.DatetimeMS(400_000_000_000_000)
    document |= {"created_at": far, "updated_at": far, "started_at": far}
    shared.jobs.collection.insert_one(document)
    assert run(shared)["status"] == "completed"
    projection = {"status": True}
    status = shared.jobs.collection.find_one({"_id": document["_id"]}, projection)
    assert status is not None and status["status"] == "completed"
    shared.jobs.collection.delete_one({"_id": document["_id"]})


def test_text_that_is_no_utf_8(shared: Shared) -> None:
    """Drivers of other languages do not check it, and neither does MongoDB."""
    document = plain({"python_path": str(shared.jobs.directory / "no_op.py"), "request_name": "caf@", "note": "b@d"})
    raw = bson.encode(document).replace(b"caf@", b"caf\xe9").replace(b"b@d", b"b\xe9d")
    shared.jobs.collection.insert_one(RawBSONDocument(raw))
    assert run(shared)["status"] == "completed"
    status = shared.jobs.collection.find_one({"_id": document["_id"]}, {"status": True, "reason": True})
    assert status is not None and status["status"] in ("completed", "failed")
    shared.jobs.collection.delete_one({"_id": document["_id"]})


@pytest.mark.parametrize("status", ["done", 5, "", "Pending"])
def test_a_status_that_is_none_of_ours_is_left_alone(shared: Shared, status: Any) -> None:
    job_id = shared.jobs.insert(status=status)
    behind = shared.jobs.insert()
    shared.jobs.wait(behind)
    document = shared.jobs.get(job_id)
    assert document["status"] == status
    assert "attempts" not in document
    shared.jobs.collection.delete_one({"_id": job_id})
