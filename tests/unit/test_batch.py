"""Files of jobs, read line by line."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from supervisor.cli.batch import Format, format_of, records
from supervisor.errors import UsageError


def read(data: bytes, kind: Format) -> list[tuple[int, Any]]:
    return [(r.line, str(r.error) if r.error else r.fields) for r in records(io.BytesIO(data), kind)]


def test_reads_json_lines() -> None:
    data = (
        b'\xef\xbb\xbf{"python_path": "/t/a.py", "scheduled_date": "2030-01-01T10:00:00+02:00", "env": {"A": "b"}}\n\n'
    )
    data += b'{"python_path": "/t/b.py", "request_name": "b", "scheduled_date": "2030-01-01"}'
    (first, a), (last, b) = read(data, "jsonl")
    assert (first, last) == (1, 3)
    assert a["request_name"] == "a.py"
    assert a["scheduled_date"] == datetime(2030, 1, 1, 10, tzinfo=timezone(timedelta(hours=2)))
    assert a["env"] == {"A": "b"}
    assert (b["request_name"], b["scheduled_date"]) == ("b", datetime(2030, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "document: is not JSON"),
        (b"[1]", "document: is not a JSON object"),
        (b"\xff", "document: is not valid UTF-8"),
        (b"[" * 200_000, "document: is not JSON"),
        (b"{}", "python_path: is missing"),
        (
            b'{"python_path": "a.py", "scheduled_date": "soon"}',
            "scheduled_date: 'soon' is not an ISO 8601 time",
        ),
        (b'{"python_path": "a.py", "scheduled_date": "0001-01-01T00:00:00+05:00"}', "is outside the years 1 to 9999"),
        (b'{"python_path": "a.py", "scheduled_date": {"$date": "soon"}}', "scheduled_date: 'soon' is not"),
        (b'{"python_path": "a.py", "scheduled_date": {"$date": {"$numberLong": "9e9"}}}', "scheduled_date: "),
        (b'{"python_path": "a.py", "scheduled_date": {"$date": 1e400}}', "scheduled_date: "),
        (b'{"python_path": "a.py", "scheduled_date": {"$date": 9999999999999999}}', "scheduled_date: "),
        (b'{"python_path": "a.py", "priority": {"$numberInt": []}}', "priority: "),
        (b'{"python_path": "a.py", "created_at": 1}', "created_at: 1 is not an ISO 8601 time"),
        (b'{"python_path": "a.py", "status": "completed"}', "status: is 'completed': only a pending job"),
        (b'{"python_path": "a.py", "status": []}', "status: is []: only a pending job"),
    ],
)
def test_names_what_is_wrong_with_a_line(line: bytes, words: str) -> None:
    good = b'{"python_path": "/t/a.py"}'
    answers = read(b"\n".join([good, line, good]), "jsonl")
    assert [number for number, _ in answers] == [1, 2, 3]
    assert words in answers[1][1]
    assert isinstance(answers[2][1], dict)


def test_reads_what_was_exported() -> None:
    data = b"""{"_id": {"$oid": "66b0c0c0c0c0c0c0c0c0c0c0"}, "request_name": "a", "python_path": "/t/a.py",
        "python_args": ["x"], "status": "pending", "created_at": {"$date": "2030-01-01T10:00:00.5Z"},
        "updated_at": {"$date": "2030-01-02T00:00:00Z"}, "scheduled_date": {"$date": {"$numberLong": "1893492000000"}},
        "required_memory": {"$numberInt": "64"}, "priority": {"$numberLong": "-3"},
        "timeout": {"$numberDouble": "1.5"}, "logs": ["[x] created"], "env": {"$oid": "1"},
        "attempts": 1, "lock": null, "error": "exited with code 1"}"""
    ((_, fields),) = read(data.replace(b"\n", b" "), "jsonl")
    assert fields == {
        "request_name": "a", "python_path": "/t/a.py", "python_args": ["x"], "required_memory": 64, "priority": -3,
        "timeout": 1.5, "env": {"$oid": "1"}, "created_at": datetime(2030, 1, 1, 10, 0, 0, 500_000, tzinfo=UTC),
        "scheduled_date": datetime(2030, 1, 1, 10, tzinfo=UTC),
    }  # fmt: skip


def test_a_column_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="line 2: the column 'python_path' is there more than once"):
        read(b"\npython_path,priority, python_path\n/t/a.py,1,/t/b.py\n", "csv")


def test_reads_csv() -> None:
    data = (
        b"python_path,python_args,required_memory,env,tags,timeout,memory_warning,request_name,scheduled_date\r\n"
        b'/t/a.py,--name \'x y\',64,"{""A"": ""b""}","red, blue",1.5,true,"two\nlines",2030-01-01T00:00:00Z\r\n'
        b'/t/b.py,"[""a b"", """"]",,,,,,,\r\n'
    )
    (_, a), (line, b) = read(data, "csv")
    assert a == {
        "python_path": "/t/a.py", "python_args": ["--name", "x y"], "required_memory": 64, "env": {"A": "b"},
        "tags": ["red", "blue"], "timeout": 1.5, "memory_warning": True, "request_name": "two\nlines",
        "scheduled_date": datetime(2030, 1, 1, tzinfo=UTC),
    }  # fmt: skip
    assert line == 4
    assert b == {"python_path": "/t/b.py", "python_args": ["a b", ""], "request_name": "b.py"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"/t/a.py,many,", "required_memory: must be a number, not 'many'"),
        (b"/t/a.py,1,{", "env: is not a JSON object"),
        (b"/t/a.py,1,{},more", "document: has 4 columns, the header has 3"),
        (b",1,", "python_path: is missing"),
    ],
)
def test_names_what_is_wrong_with_a_row(row: bytes, words: str) -> None:
    answers = read(b"python_path,required_memory,env\n/t/a.py,1,\n" + row + b"\n/t/a.py,1,\n", "csv")
    assert [number for number, _ in answers] == [2, 3, 4]
    assert words in answers[1][1]


def test_knows_the_format_by_the_name() -> None:
    assert [format_of(name, None) for name in ("a.csv", "a.CSV", "a.jsonl", "a.ndjson", "-")] == [
        "csv", "csv", "jsonl", "jsonl", "jsonl",
    ]  # fmt: skip
    assert format_of("a.txt", "csv") == "csv"
    with pytest.raises(UsageError, match="--format"):
        format_of("a.txt", None)
