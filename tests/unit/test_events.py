"""How events read, what is kept out of them, and that writing them never stops anyone."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor import events
from supervisor.events import MAX_LINE_BYTES, REPEATS_PER_MINUTE, EventHandler, RateLimit


class Lines:
    """A log whose lines a test reads, and whose clock it sets."""

    def __init__(self, json_lines: bool, read: int, write: int) -> None:
        self._unread = b""
        self.now = 0.0
        self._read = read
        self._target = logging.Logger("supervisor.pool", logging.DEBUG)
        self._target.addHandler(EventHandler(write, json_lines=json_lines, monotonic=lambda: self.now))
        self.log = events.Logger(self._target)

    def next(self) -> str:
        while b"\n" not in self._unread:
            assert select.select([self._read], [], [], 10)[0], "no line was written"
            self._unread += os.read(self._read, 65536)
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode() + "\n"

    def foreign(self, message: str, *args: object, **options: Any) -> None:
        self._target.warning(message, *args, **options)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def text(pipe: tuple[int, int]) -> Lines:
    return Lines(False, *pipe)


@pytest.fixture
def as_json(pipe: tuple[int, int]) -> Lines:
    return Lines(True, *pipe)


def test_a_line_of_text(text: Lines) -> None:
    text.log.info("job_finished", job_id="6562", attempt=2, reason=None, seconds=0.1 + 0.2, ok=True)
    stamp, rest = text.next().split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert rest == "INFO pool job_finished job_id=6562 attempt=2 seconds=0.3 ok=true\n"


def test_the_sentence_comes_first(text: Lines) -> None:
    text.log.warning("mongo_lost", retry=3, msg="MongoDB is away.")
    assert text.next().endswith(' WARNING pool mongo_lost msg="MongoDB is away." retry=3\n')


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ('say "hi"', r'"say \"hi\""'),
        ("line\nline\r\t", r'"line\nline\r\t"'),
        ("\x1b[31mred\x9b\u2028", r'"\u001b[31mred\u009b\u2028"'),
        ("back\\slash", r'"back\\slash"'),
        ("Zürich", "Zürich"),
        (["default", "mail"], '"default, mail"'),
        (ValueError("no\nway"), r'"ValueError: no\nway"'),
        (float("inf"), "inf"),
    ],
)
def test_a_value_can_neither_break_the_line_nor_the_terminal(text: Lines, value: Any, shown: str) -> None:
    text.log.info("x", value=value)
    assert text.next().split(" ", 3)[3] == f"x value={shown}\n"


def test_a_line_of_json(as_json: Lines) -> None:
    as_json.log.error("x", attempt=2, error=OSError("no\nway"), share=float("nan"), lone="\ud800", event="mine")
    line = as_json.next()
    assert "NaN" not in line
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "error", "logger": "pool", "event": "x", "attempt": 2, "error": "OSError: no\nway",
        "share": "nan", "lone": "\ud800", "event_": "mine",
    }  # fmt: skip


URI = "mongodb://root:s3cret%40x@db1,db2/admin"


@pytest.mark.parametrize(
    "value", [URI, f"cannot reach {URI}, twice {URI}", [URI], OSError(URI), {"uri": URI}, "x" * 1480 + URI]
)
def test_passwords_are_masked_in_every_kind_of_value(text: Lines, value: Any) -> None:
    text.log.info("x", msg=value, other="a@b")
    line = text.next()
    assert "s3cr" not in line
    assert line.endswith(" other=a@b\n")


def test_masking_in_json_keeps_to_its_value(as_json: Lines) -> None:
    as_json.log.info("x", first="mongodb://host", second="a@b", third=URI)
    entry = json.loads(as_json.next())
    assert (entry["first"], entry["second"], entry["third"]) == (
        "mongodb://host", "a@b", "mongodb://***@db1,db2/admin",
    )  # fmt: skip


def test_passwords_in_messages_of_libraries_are_masked(text: Lines) -> None:
    try:
        raise OSError(f"cannot reach {URI}")
    except OSError:
        text.foreign("failed: %s", URI, exc_info=True)
    line = text.next()
    assert "s3cret" not in line
    assert "WARNING pool log msg=" in line
    assert "Traceback" in line


@pytest.mark.parametrize("form", ["text", "as_json"])
def test_no_line_is_longer_than_an_atomic_write(form: str, request: pytest.FixtureRequest) -> None:
    lines: Lines = request.getfixturevalue(form)
    for fields in (
        {"a": "x" * 10_000},
        {"a": "ü" * 9000, "b": "\n" * 9000},
        {f"k{n}": "v" * 50 for n in range(500)},
    ):
        lines.log.info("x", **fields)
        line = lines.next()
        assert len(line.encode()) <= MAX_LINE_BYTES
        if form == "as_json":
            assert json.loads(line)["event"] == "x"


def test_repeated_warnings_are_held_back_and_counted(text: Lines) -> None:
    for number in range(REPEATS_PER_MINUTE + 12):
        text.log.warning("mongo_flaps", number=number)
    text.log.warning("something_else")
    seen = [text.next() for _ in range(REPEATS_PER_MINUTE + 1)]
    assert "something_else" in seen[-1]
    text.now = 61.0
    text.log.warning("mongo_flaps")
    assert text.next().endswith(" mongo_flaps suppressed=12\n")
    text.log.warning("mongo_flaps")
    assert text.next().endswith(" mongo_flaps\n")


def test_facts_of_jobs_are_never_held_back(text: Lines) -> None:
    for number in range(5 * REPEATS_PER_MINUTE):
        text.log.info("job_started", number=number)
        assert text.next().endswith(f" number={number}\n")
        text.log.warning("job_finished", job_id=f"j{number}")
        assert text.next().endswith(f" job_id=j{number}\n")


def test_what_was_repeated_long_ago_is_forgotten() -> None:
    now = 0.0
    limit = RateLimit(lambda: now)
    for number in range(50_000):
        now += 0.1
        limit.pass_on(number)
    assert len(limit._windows) < 5000


def test_a_reader_that_stopped_reading_stops_nobody(text: Lines) -> None:
    writer = threading.Thread(target=lambda: [text.log.info("x", n=n, a="y" * 1000) for n in range(200)])
    writer.start()
    writer.join(20)
    assert not writer.is_alive(), "blocked by a full pipe"
    for _ in range(20):  # makes room
        text.next()
    text.log.info("again")
    last = ""
    while " again" not in last:
        last = text.next()
    assert re.search(r" again dropped=\d+\n", last)


def test_a_closed_reader_is_survived() -> None:
    read, write = os.pipe()
    lines = Lines(False, read, write)
    os.close(read)
    lines.log.info("x")
    os.close(write)
    lines.log.info("x")


_FORKING = """
import os
from supervisor import events
events.configure_logging("json", "debug")
log = events.logger("pool")
children = []
for child in range(4):
    pid = os.fork()
    if pid == 0:
        for number in range(200):
            log.info("x", child=child, number=number, filling="z" * (number * 17 % 3000))
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
"""


def test_lines_of_forked_processes_never_mix() -> None:
    result = subprocess.run([sys.executable, "-c", _FORKING], stderr=subprocess.PIPE, check=True, timeout=60)
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    dropped = sum(entry.get("dropped", 0) for entry in entries)
    assert len({(entry["child"], entry["number"]) for entry in entries}) >= 800 - dropped - 4


_CONFIGURED = """
import logging
from supervisor import events
events.configure_logging("text", "info")
events.configure_logging("text", "warning")
events.logger("pool").info("hidden")
events.logger("pool").warning("shown")
logging.getLogger("pymongo").info("hidden")
logging.getLogger("pymongo").warning("of a library")
"""


def test_configuring_again_replaces() -> None:
    result = subprocess.run([sys.executable, "-c", _CONFIGURED], capture_output=True, text=True, check=True, timeout=60)
    assert [line.split(" ", 1)[1] for line in result.stderr.splitlines()] == [
        "WARNING pool shown", 'WARNING pymongo log msg="of a library"',
    ]  # fmt: skip
    assert result.stdout == ""
