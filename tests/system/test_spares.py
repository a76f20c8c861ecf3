"""On an idle pool a job starts in a process that was forked before it came."""

from __future__ import annotations

import os
import time

import psutil

from tests.conftest import Start
from tests.support.running import Jobs
from tests.support.waiting import wait_until


def test_a_script_that_comes_again_runs_as_it_is_on_disk(start_supervisor: Start, jobs: Jobs) -> None:
    """Its runner keeps it compiled."""
    runner = psutil.Process(start_supervisor(workers=1).runners()[0])

    def write(source: str, seconds_ago: float) -> None:
        then = time.time() - seconds_ago
        os.utime(jobs.script(source), (then, then))

    def output() -> str:
        spare = wait_until(runner.children, what="a spare")[0]
        job_id = jobs.submit(jobs.directory / "job.py")
        jobs.wait(job_id)
        word, pid = jobs.output(job_id).decode().split() or ("", spare.pid)
        assert int(pid) == spare.pid
        return word

    write("import os\nprint('first', os.getpid())\n", 60)
    assert [output() for _ in range(4)] == ["first"] * 4
    write("import os\nprint('other', os.getpid())\n", 50)
    assert [output() for _ in range(4)] == ["other"] * 4
    write("print('no longer'\n", 40)
    assert [output() for _ in range(3)] == [""] * 3
    write("import os\nprint('again', os.getpid())\n", 30)
    assert output() == "again"
