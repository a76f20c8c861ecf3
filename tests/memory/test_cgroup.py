"""Hard limits by control groups: on a real cgroup v2 hierarchy where there is one, its files imitated elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.memory.cgroup import LEAF, MB, MemoryGroups, NoControlGroups, SlotGroup, find_own_group
from tests.conftest import Start
from tests.support.running import Jobs, RunningSupervisor, free_port
from tests.support.waiting import wait_until


def controls_memory() -> bool:
    """Whether this test may make groups with limits below its own: it runs in the root group, or a delegated one."""
    try:
        own = find_own_group()
        return "memory" in (own / "cgroup.controllers").read_text().split() and os.access(own, os.W_OK)
    except (NoControlGroups, OSError):
        return False


real = pytest.mark.skipif(not controls_memory(), reason="needs a cgroup v2 hierarchy with the memory controller")
no_real = pytest.mark.skipif(controls_memory(), reason="limits are possible here")


# -- imitated files ---------------------------------------------------------------------------------------------------


def imitate_group(path: Path, **files: str) -> Path:
    """The files of a group, as the kernel would make them."""
    path.mkdir(exist_ok=True)
    contents = {
        "cgroup.procs": "",
        "cgroup.controllers": "cpu memory\n",
        "cgroup.subtree_control": "",
        "memory.max": "",
        "memory.current": "0\n",
        "memory.oom.group": "",
        "memory.events": "low 0\noom 0\noom_kill 0\noom_group_kill 0\n",
        **{name.replace("_", ".", 1): content for name, content in files.items()},
    }
    for name, content in contents.items():
        (path / name).write_text(content)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = imitate_group(tmp_path / "base")
    imitate_group(base / LEAF)
    imitate_group(base / f"job-{os.getpid()}-trial")
    return base


def test_the_supervisor_moves_into_a_leaf_before_it_hands_memory_down(base: Path) -> None:
    groups = MemoryGroups.prepare(base)
    assert (base / LEAF / "cgroup.procs").read_text() == "0"
    assert (base / "cgroup.subtree_control").read_text() == "+memory"
    assert (base / f"job-{os.getpid()}-trial" / "cgroup.procs").read_text() == "0"
    assert groups.prefix == str(base / f"job-{os.getpid()}")


def test_one_that_is_in_such_a_leaf_uses_what_is_there(base: Path) -> None:
    (base / "cgroup.subtree_control").write_text("memory\n")
    assert MemoryGroups.prepare(base / LEAF).prefix == str(base / f"job-{os.getpid()}")
    assert (base / "cgroup.subtree_control").read_text() == "memory\n"


def test_without_the_controller_nothing_is_changed(base: Path) -> None:
    (base / "cgroup.controllers").write_text("cpu pids\n")
    with pytest.raises(NoControlGroups, match="has no memory controller"):
        MemoryGroups.prepare(base)
    assert (base / LEAF / "cgroup.procs").read_text() == ""


def test_a_group_that_may_not_be_changed_is_left_again(tmp_path: Path) -> None:
    base = imitate_group(tmp_path / "base")
    imitate_group(base / LEAF)
    (base / "cgroup.subtree_control").unlink()
    with pytest.raises(NoControlGroups, match=r"No such file.*subtree_control"):
        MemoryGroups.prepare(base)
    assert (base / "cgroup.procs").read_text() == "0"


def test_what_a_dead_supervisor_left_is_removed(base: Path) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    dead, living = base / f"job-{pid}-3", base / f"job-{os.getppid()}-3"
    dead.mkdir()
    living.mkdir()
    MemoryGroups.prepare(base)
    assert (dead.exists(), living.exists()) == (False, True)


def test_a_slot_limits_judges_and_forgets(tmp_path: Path) -> None:
    path = imitate_group(tmp_path / "slot")
    group = SlotGroup(str(path))
    group.limit(64)
    assert (path / "memory.max").read_text() == str(96 * MB)
    assert (path / "memory.oom.group").read_text() == "1"
    group.join()
    assert (path / "cgroup.procs").read_text() == "0"
    assert not group.has_killed()
    (path / "memory.events").write_text("oom 1\noom_kill 3\n")
    assert group.has_killed()
    (path / "memory.max").write_text("")
    group.limit(1024)
    assert (path / "memory.max").read_text() == str(1152 * MB)
    assert not group.has_killed(), "that was the job before"


def test_a_group_that_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "slot"
    group = SlotGroup(str(path))
    with pytest.raises(FileNotFoundError):
        group.limit(64)
    path.parent.mkdir()
    imitate_group(path)
    group.limit(64)


# -- settings ---------------------------------------------------------------------------------------------------------


@no_real
def test_where_it_is_impossible_the_start_fails(tmp_path: Path) -> None:
    supervisor = RunningSupervisor(
        tmp_path, "mongodb://127.0.0.1:1", "none", memory_enforcement="cgroup", metrics_port=free_port()
    )
    result = supervisor.command("run")
    assert result.returncode == 2
    assert "SUPERVISOR_MEMORY_ENFORCEMENT: memory cannot be limited here: " in result.stderr
    assert "Traceback" not in result.stderr


@no_real
def test_auto_falls_back(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor()
    assert supervisor.metric("memory_enforcement_info", mode="sampling") == 1
    assert supervisor.metric("memory_enforcement_info", mode="cgroup") == 0


def test_sampling_can_be_chosen(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(memory_enforcement="sampling")
    assert supervisor.metric("memory_enforcement_info", mode="sampling") == 1
    job_id = jobs.submit(jobs.script("print(open('/proc/self/cgroup').read())"))
    assert jobs.wait(job_id)["status"] == "completed"
    assert b"job-" not in jobs.output(job_id)


# -- a real hierarchy -------------------------------------------------------------------------------------------------

TMPFS_HOG = """
import os, sys
name = f"/dev/shm/hog-{os.environ['JOB_ID']}"
with open(name, "wb") as file:
    os.unlink(name)
    for _ in range(300):
        file.write(bytes(1 << 20))
"""
"""Sampling cannot see this: nobody maps it."""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group as a service manager delegates it."""
    own = find_own_group()
    descriptor = os.open(own / "cgroup.subtree_control", os.O_WRONLY)
    os.write(descriptor, b"+memory")
    os.close(descriptor)
    group = own / f"test-{os.getpid()}"
    group.mkdir()
    yield group
    for path in sorted(group.glob("**/"), reverse=True):
        wait_until(lambda path=path: not (path / "cgroup.procs").read_text(), what=f"{path} to be empty")  # type: ignore[misc]
        path.rmdir()


@pytest.fixture
def limited(group: Path, start_supervisor: Start) -> RunningSupervisor:
    return start_in(group, start_supervisor)


def start_in(group: Path, start_supervisor: Start, **settings: object) -> RunningSupervisor:
    own = find_own_group()
    (group / "cgroup.procs").write_text("0")
    try:
        supervisor = start_supervisor(ready=False, memory_enforcement="cgroup", **settings)
    finally:
        (own / "cgroup.procs").write_text("0")
    wait_until(supervisor.is_ready, what=lambda: f"the supervisor to be ready: {supervisor.log()}")
    return supervisor


def job_groups(group: Path) -> list[Path]:
    return list(group.glob("job-*"))


@real
@pytest.mark.parametrize("settings", [{}, {"isolation": "pidns"}], ids=["", "isolated"])
@pytest.mark.parametrize("start_method", ["warm", "exec"])
def test_the_kernel_ends_what_sampling_cannot_see(
    group: Path, start_supervisor: Start, jobs: Jobs, start_method: str, settings: dict[str, object]
) -> None:
    supervisor = start_in(group, start_supervisor, workers=1, **settings)
    assert supervisor.metric("memory_enforcement_info", mode="cgroup") == 1
    document = jobs.run(TMPFS_HOG, required_memory=64, start_method=start_method)
    assert (document["status"], document["reason"], document["exit_code"]) == ("failed", "memory_exceeded", -9)
    assert document["error"].startswith("used 96 MB of the 64 MB in required_memory: ended by the kernel")
    assert document["peak_memory"] == 96
    document = jobs.run("kept = bytearray(40 << 20)", required_memory=64, start_method=start_method)
    assert document["status"] == "completed", "the slot is as before"


@real
def test_sampling_stays_the_judge(limited: RunningSupervisor, jobs: Jobs) -> None:
    hog = "import time\nkept = []\nwhile True:\n kept.append(bytearray(1 << 20))\n time.sleep(0.02)\n"
    document = jobs.run(hog, required_memory=64)
    assert document["reason"] == "memory_exceeded"
    assert "kernel" not in document["error"]


@real
def test_jobs_below_their_limit_are_left_alone(limited: RunningSupervisor, jobs: Jobs, tmp_path: Path) -> None:
    """Neither file cache nor what many processes cost the kernel counts as theirs."""
    large = tmp_path / "large"
    large.write_bytes(bytes(200 << 20))
    reader = "import sys\nwith open(sys.argv[1], 'rb') as file:\n while file.read(1 << 20): pass\n"
    assert jobs.run(reader, large, required_memory=64)["status"] == "completed"
    writer = "import sys\nwith open(sys.argv[1], 'wb') as file:\n for _ in range(200): file.write(bytes(1 << 20))\n"
    assert jobs.run(writer, large, required_memory=64)["status"] == "completed"
    family = """
import os, time
kept = bytearray(16 << 20)
for _ in range(10):
    if os.fork() == 0:
        mine = bytearray(1 << 20)
        time.sleep(3)
        os._exit(0)
for _ in range(10):
    os.wait()
"""
    document = jobs.run(family, required_memory=64)
    assert document["status"] == "completed", document["error"]


@real
def test_another_killer_is_not_mistaken_for_the_kernel(limited: RunningSupervisor, jobs: Jobs) -> None:
    for _ in range(2):
        jobs.run(TMPFS_HOG, required_memory=64)
    document = jobs.run("import os; os.kill(os.getpid(), 9)", required_memory=64)
    assert (document["reason"], document["exit_code"]) == ("signal", -9)


@real
def test_only_the_job_is_in_its_group(group: Path, limited: RunningSupervisor, jobs: Jobs) -> None:
    job_id = jobs.submit(jobs.script("print(open('/proc/self/cgroup').read())"))
    jobs.wait(job_id)
    assert re.search(rb"/job-\d+-[01]\n", jobs.output(job_id))
    ours = set(map(int, (group / LEAF / "cgroup.procs").read_text().split()))
    assert {limited.pid, limited.keeper(), limited.warm_interpreter(), *limited.workers(), *limited.runners()} <= ours


@real
def test_nothing_is_left_of_the_groups(group: Path, start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_in(group, start_supervisor)
    jobs.run("pass")
    assert len(job_groups(group)) == 2
    assert supervisor.stop() == 0
    assert list(group.glob("*/")) == []
    killed = start_in(group, start_supervisor)
    jobs.run("pass")
    killed.kill()
    wait_until(lambda: not (group / LEAF / "cgroup.procs").read_text(), what="everything to have ended")
    start_in(group / LEAF, start_supervisor)  # the group itself can hold no process any more
    assert not [path for path in job_groups(group) if path.name.startswith(f"job-{killed.pid}-")]


@real
def test_a_group_with_others_in_it_is_not_ours(group: Path, tmp_path: Path) -> None:
    supervisor = RunningSupervisor(
        tmp_path, "mongodb://127.0.0.1:1", "none", memory_enforcement="cgroup", metrics_port=free_port()
    )
    (group / "cgroup.procs").write_text("0")
    try:
        result = supervisor.command("run")
    finally:
        (find_own_group().parent / "cgroup.procs").write_text("0")
    assert result.returncode == 2
    assert "SUPERVISOR_MEMORY_ENFORCEMENT" in result.stderr and "busy" in result.stderr
    assert list(group.glob("*/")) == []
