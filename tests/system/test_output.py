"""What jobs print: kept within bounds, whatever it is, and readable while they run."""

from __future__ import annotations

import itertools

import bson
import pytest

from tests.conftest import Shared, Start
from tests.support.running import Document, Jobs
from tests.support.waiting import wait_until

MB = 1 << 20
KB = 1 << 10


def block(document: Document, stream: str) -> str:
    """What the job's own log shows of a stream."""
    found = [line.partition("] ")[2] for line in document["logs"]]
    blocks = [line for line in found if line.startswith(f"--- {stream} ---")]
    assert len(blocks) <= 1
    return blocks[0].partition("\n")[2] if blocks else ""


def stored_bytes(jobs: Jobs, job_id: object) -> int:
    chunks = jobs.collection.database["job_logs"].find({"job_id": job_id})
    return sum(len(chunk["data"]) for chunk in chunks)


def test_both_streams_are_kept(shared: Shared) -> None:
    document = shared.jobs.run("import sys; print('out'); print('err', file=sys.stderr)")
    assert block(document, "STDOUT") == "out\n"
    assert block(document, "STDERR") == "err\n"
    assert shared.jobs.output(document["_id"]) == b"out\n"
    assert shared.jobs.output(document["_id"], "stderr") == b"err\n"


def test_200_mb_of_output(start_supervisor: Start, jobs: Jobs) -> None:
    """The first and the last half of the limit are kept, and neither document nor supervisor grows with the rest."""
    supervisor = start_supervisor(log_limit=4, workers=1)
    document = jobs.run(
        """
import sys
line = b"%011d\\n"
for n in range(200 * 2**20 // 12 // 1000):
    sys.stdout.buffer.write(b"".join(line % i for i in range(n * 1000, n * 1000 + 1000)))
""",
        required_memory=64,
    )
    assert document["status"] == "completed", document["error"]
    assert len(bson.encode(document)) < 200 * KB
    kept = jobs.output(document["_id"])
    assert 3.8 * MB < len(kept) <= 4 * MB + 64 * KB
    lines = [line for line in kept.splitlines() if len(line) == 11]
    numbers = [int(line) for line in lines]
    last = 200 * MB // 12 // 1000 * 1000 - 1
    assert numbers[0] == 0 and numbers[-1] == last
    gaps = [(a, b) for a, b in itertools.pairwise(numbers) if b != a + 1]
    assert len(gaps) == 1, "first half, one gap, last half"
    assert abs(numbers.index(gaps[0][0]) - len(numbers) / 2) < len(numbers) / 20
    assert stored_bytes(jobs, document["_id"]) == len(kept)
    assert len(block(document, "STDOUT")) <= 64 * KB
    assert block(document, "STDOUT").endswith(f"{last:011d}\n")
    assert supervisor.metric("process_resident_memory_bytes") < 200 * MB


@pytest.mark.parametrize(
    ("name", "source", "expected", "text"),
    [
        ("invalid UTF-8", r"b'\xff\xfe caf\xe9\n'", b"\xff\xfe caf\xe9\n", "\ufffd\ufffd caf\ufffd\n"),
        ("NUL bytes", r"b'a\0b\0\n'", b"a\0b\0\n", "a\0b\0\n"),
        ("half a character", r"'é'.encode()[:1]", b"\xc3", "\ufffd"),
        ("no end of line", r"b'half'", b"half", "half"),
        ("a dollar first", r"b'$status $$NOW\n'", b"$status $$NOW\n", "$status $$NOW\n"),
        ("control characters", r"b'\x1b[31mred\x07\n'", b"\x1b[31mred\x07\n", "\x1b[31mred\x07\n"),
    ],
)
def test_malformed_output_is_kept_to_the_byte(
    shared: Shared, name: str, source: str, expected: bytes, text: str
) -> None:
    document = shared.jobs.run(f"import sys; sys.stdout.buffer.write({source})")
    assert document["status"] == "completed"
    assert shared.jobs.output(document["_id"]) == expected
    assert block(document, "STDOUT") == text


def test_one_endless_line(shared: Shared) -> None:
    document = shared.jobs.run("import sys\nfor _ in range(3000): sys.stdout.write('x' * 1000)")
    assert document["status"] == "completed"
    assert shared.jobs.output(document["_id"]) == b"x" * 3_000_000
    assert block(document, "STDOUT") == "x" * 64 * KB


def test_both_streams_at_once_and_in_order(shared: Shared) -> None:
    document = shared.jobs.run("""
import os
for n in range(20000):
    os.write(1 + n % 2, b"%06d\\n" % n)
""")
    chunks = list(shared.jobs.manager.output.read(document["_id"], 1))
    assert [chunk.seq for chunk in chunks] == sorted(chunk.seq for chunk in chunks)
    for stream, odd in (("stdout", 0), ("stderr", 1)):
        assert shared.jobs.output(document["_id"], stream) == b"".join(b"%06d\n" % n for n in range(odd, 20000, 2))


def test_a_job_may_close_its_output(shared: Shared) -> None:
    document = shared.jobs.run("""
import os, time
print("before", flush=True)
os.close(1); os.close(2)
time.sleep(0.3)
os._exit(7)
""")
    assert (document["status"], document["exit_code"]) == ("failed", 7)
    assert shared.jobs.output(document["_id"]) == b"before\n"


def test_output_can_be_read_while_the_job_runs(shared: Shared) -> None:
    job = shared.jobs.gated()
    job.wait_started()
    wait_until(lambda: shared.jobs.output(job.id) == b"begun\n", timeout=10, what="the first line")
    assert job.get()["status"] == "running"
    job.finish()


@pytest.mark.parametrize("detached", [False, True])
def test_a_grandchild_that_keeps_the_output_open_delays_nothing(shared: Shared, detached: bool) -> None:
    document = shared.jobs.run(f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(3600)"],
                         start_new_session={detached}, stdout=subprocess.PIPE)
child.stdout.readline()
subprocess.Popen(["sleep", "3600"], start_new_session={detached})
print("parent")
""")
    assert document["status"] == "completed"
    assert document["duration_seconds"] < 10
    assert shared.jobs.output(document["_id"]) == b"parent\n"
    assert "2 processes that it had left running" in "\n".join(document["logs"])


def test_each_attempt_has_output_of_its_own(shared: Shared) -> None:
    document = shared.jobs.run(
        """
import os, sys
print("attempt", os.environ["JOB_ATTEMPT"])
sys.exit(int(os.environ["JOB_ATTEMPT"]) < 3)
""",
        max_attempts=3,
        retry_delay=0,
    )
    assert document["status"] == "completed"
    for attempt in (1, 2, 3):
        assert shared.jobs.output(document["_id"], attempt=attempt) == f"attempt {attempt}\n".encode()
    assert shared.jobs.manager.output.attempts(document["_id"]) == [1, 2, 3]


def test_a_progress_bar_shows_its_last_state(shared: Shared) -> None:
    document = shared.jobs.run("for n in range(101): print(f'\\r{n} %', end='')\nprint()")
    assert block(document, "STDOUT") == "100 %\n"


def test_many_attempts_with_much_output_stay_far_from_the_limit_of_a_document(shared: Shared) -> None:
    source = "import sys; print('x' * 100_000); print('y' * 100_000, file=sys.stderr); sys.exit(1)"
    document = shared.jobs.run(source, max_attempts=12, retry_delay=0)
    assert document["failures"] == 12
    assert len(bson.encode(document)) < 400 * KB
