"""Process trees: found whole, told apart, and ended to the last one, with real processes of every bad habit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import processes
from supervisor.processes import (
    ProcessRef,
    boot_id,
    children,
    clock,
    descendants,
    kill_descendants,
    pid_namespace,
    process_stat,
    processes_with_environment,
    reap,
    signal_descendants,
)
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]

# The test process may have a database client's threads; its children here do nothing but wait.
pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

HABITS = '''
import os, signal, subprocess, sys, time

def fork():
    """True in the child."""
    return os.fork() == 0

def say_ready():
    os.write(int(os.environ["READY"]), b".")

def stay():
    say_ready()
    while True:
        time.sleep(60)

def tree(width=3, depth=3):
    for _ in range(width if depth else 0):
        if fork():
            tree(width, depth - 1)
    stay()

def programs():
    for _ in range(3):
        subprocess.Popen(["/bin/sleep", "600"])
    stay()

def daemon():
    if fork():
        os.setsid()
        if fork():
            stay()
        os._exit(0)
    os.wait()
    stay()

def daemon_only():
    main = os.getpid()
    if fork():
        os.setsid()
        if fork():
            while not open(f"/proc/{main}/stat").read().split(") ")[1].startswith("Z"):
                time.sleep(0.001)
            stay()
        os._exit(0)
    os.wait()
    sys.exit(3)

def nameless_daemon():
    """Leaves its session and its environment behind."""
    if fork():
        os.setsid()
        if fork():
            os.execve("/bin/sh", ["sh", "-c", f"printf . >&{os.environ['READY']}; sleep 600 & wait"], {})
        os._exit(0)
    os.wait()
    while True:
        time.sleep(60)

def deaf():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    if fork():
        stay()
    stay()

def stopped():
    if fork():
        say_ready()
        os.kill(os.getpid(), signal.SIGSTOP)
    stay()

def pair():
    """Whichever dies, the other starts it again."""
    say_ready()
    while True:
        if fork():
            os.setsid()
            say_ready()
            other = os.getppid()
            while os.getppid() == other:
                time.sleep(0.001)
        else:
            os.wait()

def runaway():
    """Its child forks and exits, always one step ahead of who counts."""
    if not fork():
        stay()
    while True:
        if not fork():
            time.sleep(0.001)
            os._exit(0)

def bomb():
    """Every process forks again, until there were 150 forks."""
    reader, writer = os.pipe()
    os.write(writer, b"." * 150)
    say_ready()
    while os.read(reader, 1):
        os.fork()
    stay()

def chain(length=60):
    """One below the other."""
    while length and fork():
        length -= 1
    stay()

def threads():
    """Its main thread has ended, the process has not."""
    import ctypes, threading
    def work():
        subprocess.Popen(["/bin/sleep", "600"])
        stay()
    threading.Thread(target=work).start()
    ctypes.CDLL(None).pthread_exit(None)

globals()[sys.argv[1]]()
'''

RUNNER = """
import json, os, select, signal, subprocess, sys, time
from supervisor.processes import *
from supervisor import processes

habit, ready_count, with_spare = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "spare"
become_subreaper()
reader, writer = os.pipe()
skip = []
if with_spare:
    spare = os.fork()
    if spare == 0:
        os.close(reader)
        while True:
            signal.pause()
    skip = [spare]
job = subprocess.Popen([sys.executable, "-c", os.environ["HABITS"], habit], pass_fds=[writer],
                       env=os.environ | {"READY": str(writer)}, start_new_session=True).pid
got = 0
while got < ready_count:
    assert select.select([reader], [], [], 30)[0], f"only {got} got ready"
    got += len(os.read(reader, 100))
before = len(descendants(os.getpid(), skip))
report = kill_descendants(os.getpid(), skip)
left = descendants(os.getpid(), skip)
spare_alive = bool(skip) and ProcessRef.of(skip[0]).is_alive()
for pid in skip:
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[0] == pid, "the spare was left for us"
try:
    os.waitpid(-1, os.WNOHANG)
    echild = False
except ChildProcessError:
    echild = True
print(json.dumps({"before": before, "killed": report.killed, "complete": report.complete, "left": left,
                  "job_status": report.statuses.get(job), "echild": echild, "spare_alive": spare_alive}))
"""


def end_job_with(habit: str, ready: int, spare: bool) -> dict[str, Any]:
    """What a runner reports that ends a job of this habit; the marker shows whether anything outlived it."""
    marker = f"{os.getpid()}-{os.urandom(4).hex()}"
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, habit, str(ready), "spare" if spare else "alone"],
        cwd=REPOSITORY,
        env=os.environ | {"HABITS": HABITS, "MARKER": marker, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        timeout=90,
        check=True,
    )
    assert processes_with_environment("MARKER", marker) == []
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "beside a spare"])
@pytest.mark.parametrize(
    ("habit", "ready", "living"),
    [
        ("tree", 40, 40),
        ("programs", 1, 4),
        ("daemon", 2, 2),
        ("daemon_only", 1, 1),
        ("nameless_daemon", 1, None),
        ("deaf", 2, 2),
        ("stopped", 2, 2),
        ("pair", 2, 2),
        ("runaway", 1, None),
        ("bomb", 1, None),
        ("chain", 61, 61),
        ("threads", 1, 2),
    ],
)
def test_nothing_is_left_of_a_job(habit: str, ready: int, living: int | None, spare: bool) -> None:
    ended = end_job_with(habit, ready, spare)
    assert ended["complete"]
    assert ended["echild"]
    assert ended["left"] == []
    assert ended["spare_alive"] == spare
    if living is not None:
        assert ended["killed"] == living
    else:
        assert ended["killed"] >= 1
    assert ended["job_status"] in ((3, -9) if habit == "daemon_only" else (-9,))


def test_only_its_own_descendants_can_be_killed() -> None:
    with pytest.raises(ValueError, match="calling process"):
        kill_descendants(1)


class Sleepers:
    """Children of the test process that sleep until the end of the test."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command or ("/bin/sleep", "600"), env=os.environ | environment)
        self._all.append(process)
        return process

    def end(self) -> None:
        for process in self._all:
            for pid in descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()


@pytest.fixture
def sleepers() -> Iterator[Sleepers]:
    sleepers = Sleepers()
    yield sleepers
    sleepers.end()


def test_a_reference_means_one_process_only(sleepers: Sleepers) -> None:
    process = sleepers.start()
    reference = ProcessRef.of(process.pid)
    assert reference == ProcessRef.of(process.pid)
    assert reference.is_alive()
    assert not ProcessRef(process.pid, reference.started - 1).is_alive(), "the id was another's before"
    process.kill()
    wait_until(lambda: not reference.is_alive(), what="a zombie counts as ended")
    assert process_stat(process.pid) is not None
    process.wait()
    assert not reference.is_alive()
    with pytest.raises(ProcessLookupError):
        ProcessRef.of(process.pid)


def test_a_name_cannot_forge_what_is_read(tmp_path: Path, sleepers: Sleepers) -> None:
    program = tmp_path / ") Z 1 (x"
    program.symlink_to("/bin/sleep")
    process = sleepers.start(str(program), "600")
    wait_until(lambda: psutil.Process(process.pid).name().startswith(")"), what="it was executed")
    found = process_stat(process.pid)
    assert found is not None
    assert (found.parent, found.ended) == (os.getpid(), False)


def test_the_image_is_kept_by_a_fork_and_changed_by_an_exec(sleepers: Sleepers) -> None:
    own = process_stat(os.getpid())
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        forked, executed = process_stat(child), process_stat(sleepers.start().pid)
        assert own is not None and forked is not None and executed is not None
        assert own.image is not None
        assert forked.image == own.image != executed.image
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_tree_is_found_with_children_of_threads_and_without_the_skipped(sleepers: Sleepers) -> None:
    program = (
        "import subprocess, threading\n"
        "start = lambda: subprocess.Popen(['/bin/sh', '-c', 'sleep 600 & wait']).wait()\n"
        "threading.Thread(target=start).start()\n"
        "start()\n"
    )
    process = sleepers.start(sys.executable, "-c", program)
    wait_until(lambda: len(descendants(process.pid)) == 4, what="all have started")
    found = descendants(process.pid)
    first, second = children(process.pid)
    assert set(found) == {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    assert all(found.index(shell) < found.index(children(shell)[0]) for shell in (first, second))
    assert set(descendants(process.pid, skip=[first])) == {second, *children(second)}
    assert children(2**22 - 1) == []


def test_without_children_files_psutil_finds_the_same(sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    process = sleepers.start("/bin/sh", "-c", "sleep 600 & wait")
    wait_until(lambda: len(descendants(process.pid)) == 1, what="the shell has started it")
    found = descendants(os.getpid())
    real = processes._read
    monkeypatch.setattr(processes, "_HAS_CHILDREN_FILES", False)
    monkeypatch.setattr(processes, "_read", lambda path: None if path.endswith("/children") else real(path))
    assert descendants(os.getpid()) == found
    assert children(2**22 - 1) == []


def test_a_signal_reaches_every_descendant_but_the_skipped(sleepers: Sleepers) -> None:
    first, second = sleepers.start(), sleepers.start()
    spared = sleepers.start()
    assert signal_descendants(os.getpid(), signal.SIGTERM, skip=[spared.pid]) == 2
    assert (first.wait(), second.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert spared.poll() is None


def test_no_signal_is_sent_to_who_is_no_descendant(sleepers: Sleepers) -> None:
    stranger, family = sleepers.start(), sleepers.start("/bin/sh", "-c", "sleep 600 & wait")
    wait_until(lambda: descendants(family.pid), what="the shell has a child")
    tree = processes._Tree(family.pid)
    assert not tree.signal(stranger.pid, signal.SIGKILL)
    assert not tree.signal(2**22 - 1, signal.SIGKILL)
    assert tree.signal(descendants(family.pid)[0], 0)
    assert stranger.poll() is None


def test_reaping_takes_all_that_ended_but_the_skipped() -> None:
    def child(code: int) -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(code)
        return pid

    def has_ended(pid: int) -> bool:
        found = process_stat(pid)
        return found is not None and found.ended

    spare, first, second = child(1), child(7), child(0)
    killed = os.fork()
    if killed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    for pid in (spare, first, second, killed):
        wait_until(lambda pid=pid: has_ended(pid), what="the child has ended")  # type: ignore[misc]
    assert reap(skip=[spare]) == {first: 7, second: 0, killed: -9}
    assert reap() == {spare: 1}
    assert reap() == {}


def test_processes_are_found_by_what_they_were_started_with(sleepers: Sleepers) -> None:
    value = os.urandom(8).hex()
    marked = sleepers.start(MARKER=value)
    sleepers.start(MARKER=value + "0")
    sleepers.start(OTHER_MARKER=value)
    wait_until(lambda: ProcessRef.of(marked.pid) in processes_with_environment("MARKER", value), what="exec")
    assert processes_with_environment("MARKER", value) == [ProcessRef.of(marked.pid)]
    marked.kill()
    wait_until(lambda: processes_with_environment("MARKER", value) == [], what="a zombie is not found")


IN_A_CHILD = {
    "dies with its parent": '''
import os, signal, time
from supervisor.processes import die_with_parent
middle = os.fork()
if middle == 0:
    me = os.getpid()
    ready, told = os.pipe()
    if os.fork() == 0:
        die_with_parent(me, signal.SIGKILL)
        os.write(told, b".")
        time.sleep(600)
    os.read(ready, 1)
    os._exit(0)
os.waitpid(middle, 0)
''',
    "exits when its parent is gone": '''
import os, signal
from supervisor.processes import die_with_parent
child = os.fork()
if child == 0:
    die_with_parent(os.getppid() + 1, signal.SIGKILL)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
''',
    "adopts orphans": '''
import os
from supervisor.processes import become_subreaper, children
become_subreaper()
middle = os.fork()
if middle == 0:
    if os.fork() == 0:
        os.read(0, 1)
    os._exit(0)
os.waitpid(middle, 0)
(orphan,) = children(os.getpid())
os.kill(orphan, 9)
assert os.waitpid(-1, 0)[0] == orphan
''',
    "raises its oom score only": '''
from pathlib import Path
from supervisor.processes import set_oom_score_adj
path = Path("/proc/self/oom_score_adj")
before = int(path.read_text())
set_oom_score_adj(before + 10)
assert int(path.read_text()) == before + 10
set_oom_score_adj(before)
assert int(path.read_text()) == before + 10
set_oom_score_adj(5000)
assert int(path.read_text()) == 1000
''',
}  # fmt: skip


@pytest.mark.parametrize("deed", IN_A_CHILD)
def test_a_process(deed: str) -> None:
    marker = os.urandom(8).hex()
    subprocess.run(
        [sys.executable, "-c", IN_A_CHILD[deed]],
        cwd=REPOSITORY,
        env=os.environ | {"MARKER": marker, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    wait_until(lambda: processes_with_environment("MARKER", marker) == [], what="nothing is left of it")


def test_the_clock_is_one_for_all_and_names_its_boot() -> None:
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            "from supervisor.processes import *; print(clock(), boot_id(), pid_namespace())",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, boot, namespace = asked.stdout.split()
    assert 0 <= clock() - float(before) < 60
    assert (boot, namespace) == (boot_id(), pid_namespace())
    assert time.monotonic() <= clock() + 1
