"""Memory: a job that overruns its limit is ended with everything it started, and the document says why."""

from __future__ import annotations

import re
import signal
import time

import psutil
import pytest

from tests.conftest import Shared
from tests.support.mongod import MongoServer
from tests.support.running import REPOSITORY, Document, Jobs, RunningSupervisor, wait_gone

HOG = REPOSITORY / "tasks" / "memory_hog.py"
REFERENCE = REPOSITORY / "deploy" / "REFERENCE.md"
MB = 1 << 20
HOG_WITH_CHILDREN = """
import os, subprocess, sys, time
with open(sys.argv[1], "w", buffering=1) as file:
    for environment in (None, {}):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"],
                                 start_new_session=True, env=environment)
        print(child.pid, file=file)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print(os.getpid(), file=file, flush=True)
            os.closerange(0, 3)
            time.sleep(3600)
        os._exit(0)
    os.wait()
    print(os.getpid(), file=file)
blocks = []
while True:
    blocks.append(bytearray(2**20))
"""


def assert_exceeded(document: Document, limit_mb: int) -> None:
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "memory_exceeded", -9)
    used = re.fullmatch(rf"used (\d+) MB of the {limit_mb} MB in required_memory", document["error"])
    assert used, document["error"]
    assert int(used[1]) > limit_mb
    assert limit_mb < document["peak_memory"] < limit_mb + 1000, "long before a hog has what it wants"
    assert document["failures"] == 1


@pytest.mark.parametrize("start_method", ["warm", "exec"])
def test_a_hog_is_killed_with_all_that_it_started(supervisor: RunningSupervisor, jobs: Jobs, start_method: str) -> None:
    script, record = jobs.script(HOG_WITH_CHILDREN), jobs.directory / "pids"
    document = jobs.wait(jobs.submit(script, record, required_memory=100, start_method=start_method))
    assert_exceeded(document, 100)
    pids = [int(line) for line in record.read_text().split()]
    assert len(pids) == 4
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "the outcome is written when nothing is left"
    supervisor.wait_idle(2)
    assert supervisor.metric("memory_kills_total") == 1
    assert supervisor.metric("memory_kill_delay_seconds_count") == 1
    assert supervisor.metric("memory_kill_delay_seconds_sum") < 2
    assert supervisor.metric("jobs_finished_total", status="failed", reason="memory_exceeded") == 1
    assert supervisor.metric("memory_reserved_bytes") == 0


def test_memory_of_all_processes_counts_together(shared: Shared) -> None:
    document = shared.jobs.run(
        """
import os, time
for _ in range(4):
    if os.fork() == 0:
        block = bytearray(30 * 2**20)
        time.sleep(60)
time.sleep(60)
""",
        required_memory=100,
    )
    assert_exceeded(document, 100)


def test_shared_pages_count_once(shared: Shared) -> None:
    """Four forks that share 60 MB are no 300 MB."""
    document = shared.jobs.run(
        """
import os, time
block = bytearray(60 * 2**20)
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        time.sleep(0.7)
        os._exit(0)
for _ in range(4):
    os.wait()
""",
        required_memory=110,
    )
    assert document["status"] == "completed", document["error"]
    assert 60 <= document["peak_memory"] <= 110


def test_a_job_just_below_its_limit_completes(shared: Shared) -> None:
    job_id = shared.jobs.submit(HOG, "--mb", 100, "--hold", 0.5, required_memory=112, start_method="exec")
    document = shared.jobs.wait(job_id)
    assert document["status"] == "completed", document["error"]
    assert 100 <= document["peak_memory"] <= 112


def test_memory_is_used_as_fast_as_possible(shared: Shared) -> None:
    job_id = shared.jobs.submit(HOG, "--mb", 2000, "--shape", "mmap", required_memory=64)
    assert_exceeded(shared.jobs.wait(job_id), 64)


def test_the_log_names_the_largest_process(shared: Shared) -> None:
    job_id = shared.jobs.submit(HOG, "--mb", 400, required_memory=64)
    document = shared.jobs.wait(job_id)
    assert any("memory_hog.py" in line and "MB in process" in line for line in document["logs"])


def test_a_database_that_hangs_delays_no_kill(
    supervisor: RunningSupervisor, jobs: Jobs, mongo_server: MongoServer
) -> None:
    job = jobs.gated(
        required_memory=80,
        source="""
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(f"main 1 {os.getpid()} 0\\n")
while not os.path.exists(sys.argv[1] + ".open"):
    time.sleep(0.01)
blocks = []
while True:
    blocks.append(bytearray(2**20))
""",
    )
    main = psutil.Process(job.wait_started())
    mongo_server.pause()
    try:
        job.let_go()
        began = time.monotonic()
        wait_gone([main], within=3)
        assert time.monotonic() - began < 3
    finally:
        mongo_server.resume()
    assert_exceeded(jobs.wait(job.id), 80)


def test_a_warning_ends_a_job_that_does_not_expect_it(shared: Shared) -> None:
    """As the reference says: SIGUSR1 without a handler."""
    job_id = shared.jobs.submit(HOG, "--mb", 122, "--hold", 30, required_memory=128, memory_warning=True)
    document = shared.jobs.wait(job_id)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "signal", -signal.SIGUSR1)
    row = next(line for line in REFERENCE.read_text().splitlines() if line.startswith("| `memory_warning`"))
    assert "`reason: signal`" in row and f"`exit_code: {document['exit_code']}`" in row


def test_growing_memory_on_request(shared: Shared) -> None:
    """`memory_growth`: tried again with more, until it is enough or `max_memory` is reached."""
    job_id = shared.jobs.submit(HOG, "--mb", 150, "--hold", 0.3, required_memory=64, memory_growth=2.0, max_memory=256)
    document = shared.jobs.wait(job_id)
    assert document["status"] == "completed", document["error"]
    assert (document["attempts"], document["required_memory"]) == (3, 256)
    assert (document["declared_memory"], document["memory_kills"]) == (64, 2)
