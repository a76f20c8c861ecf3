"""Signals of `python -m supervisor`, its exit codes, and what stops its start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import Start
from tests.support.mongod import MongoServer
from tests.support.running import Jobs, RunningSupervisor, is_alive, wait_gone
from tests.support.waiting import wait_until

STUBBORN = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
with open(sys.argv[1], "a") as file:
    file.write(f"main {os.environ['JOB_ATTEMPT']} {os.getpid()} 0\\n")
time.sleep(60)
"""


def wait_draining(supervisor: RunningSupervisor) -> None:
    wait_until(lambda: "draining" in supervisor.get("/readyz")[1], what="the drain to begin")


def send_and_see(supervisor: RunningSupervisor, number: signal.Signals) -> None:
    """Signals that come at once are one: the next may come when this one was taken."""
    seen = supervisor.log().count(f"name={number.name}")
    supervisor.signal(number)
    wait_until(lambda: supervisor.log().count(f"name={number.name}") > seen, what=f"{number.name} to be taken")


def assert_handed_back(document: dict[str, object]) -> None:
    assert document["status"] == "pending"
    assert (document["attempts"], document["interruptions"]) == (1, 1)
    assert (document.get("failures", 0), document.get("losses", 0)) == (0, 0)
    assert "lock" not in document


# -- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_lets_running_jobs_finish_and_claims_nothing_more(
    start_supervisor: Start, jobs: Jobs, number: signal.Signals
) -> None:
    supervisor = start_supervisor()
    job = jobs.gated()
    job.wait_started()
    supervisor.signal(number)
    wait_draining(supervisor)
    late = jobs.gated()
    tree = supervisor.tree()
    assert job.finish()["status"] == "completed"
    assert supervisor.wait() == 0
    wait_gone(tree)
    assert late.get()["status"] == "pending"
    assert late.get().get("attempts", 0) == 0
    assert list(jobs.manager.jobs.collection.database["supervisors"].find()) == []


@pytest.mark.parametrize("start_method", ["warm", "exec"])
def test_a_job_that_does_not_finish_in_time_is_handed_back(
    start_supervisor: Start, jobs: Jobs, start_method: str
) -> None:
    supervisor = start_supervisor(shutdown_timeout=0.5, kill_grace=0.5)
    polite = jobs.family(hide=True, start_method=start_method)
    stubborn = jobs.gated(source=STUBBORN, start_method=start_method)
    processes = [*polite.wait_family(), psutil.Process(stubborn.wait_started())]
    assert supervisor.stop(timeout=10) == 0
    wait_gone(processes)
    for job in (polite, stubborn):
        assert_handed_back(job.get())
        assert any("interrupted: " in line for line in job.get()["logs"])
    start_supervisor()
    polite.wait_started(attempt=2)
    assert polite.finish()["attempts"] == 2


def test_a_second_ctrl_c_stops_the_jobs_now(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(shutdown_timeout=600, kill_grace=0.5)
    job = jobs.gated()
    job.wait_started()
    supervisor.signal(signal.SIGINT)
    wait_draining(supervisor)
    assert job.get()["status"] == "running"
    supervisor.signal(signal.SIGINT)
    assert supervisor.wait(10) == 0
    assert_handed_back(job.get())


def test_a_third_ctrl_c_does_not_wait_for_the_grace(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(shutdown_timeout=600, kill_grace=600)
    job = jobs.gated(source=STUBBORN)
    job.wait_started()
    for _ in range(3):
        send_and_see(supervisor, signal.SIGINT)
    assert supervisor.wait(10) == 0
    assert_handed_back(job.get())


def test_sigquit_stops_the_jobs_now(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(shutdown_timeout=600, kill_grace=0.5)
    job = jobs.family()
    family = job.wait_family()
    supervisor.signal(signal.SIGQUIT)
    assert supervisor.wait(10) == 0
    wait_gone(family)
    assert_handed_back(job.get())


def test_further_sigterms_change_nothing(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(shutdown_timeout=600)
    job = jobs.gated()
    job.wait_started()
    for _ in range(5):
        send_and_see(supervisor, signal.SIGTERM)
    assert job.finish()["status"] == "completed"
    assert supervisor.wait() == 0


def test_the_terminal_interrupts_the_whole_foreground_group(start_supervisor: Start, jobs: Jobs) -> None:
    """Ctrl-C reaches the workers, too: they must not die of it."""
    supervisor = start_supervisor()
    job = jobs.gated()
    job.wait_started()
    os.killpg(os.getpgid(supervisor.pid), signal.SIGINT)
    wait_draining(supervisor)
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)
    assert supervisor.wait() == 0


def test_a_drain_without_mongodb_ends(start_supervisor: Start, mongo_server: MongoServer) -> None:
    supervisor = start_supervisor()
    mongo_server.stop()
    try:
        assert supervisor.stop(timeout=30) == 0
    finally:
        mongo_server.start()


# -- the size of the pool -------------------------------------------------------------------------------------------


def test_sigttin_and_sigttou_change_the_size_of_the_pool(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(workers=1)
    job = jobs.gated()
    job.wait_started()
    supervisor.signal(signal.SIGTTIN)
    other = jobs.gated()
    other.wait_started()
    supervisor.signal(signal.SIGTTOU)
    for each in (job, other):
        assert each.finish()["attempts"] == 1, "a busy worker is retired when its job is done"
    supervisor.wait_idle(1)
    for _ in range(3):
        send_and_see(supervisor, signal.SIGTTOU)
    assert jobs.run("pass")["status"] == "completed", "the last worker stays"


# -- reload ---------------------------------------------------------------------------------------------------------


def write_settings(supervisor: RunningSupervisor, **settings: object) -> None:
    lines = [f"SUPERVISOR_{name.upper()}={value}\n" for name, value in settings.items()]
    (supervisor.directory / "settings.env").write_text("".join(lines))


def reload(supervisor: RunningSupervisor) -> None:
    before = supervisor.log().count("reloaded")
    supervisor.signal(signal.SIGHUP)
    wait_until(lambda: supervisor.log().count("reloaded") > before, what="the reload")


def test_sighup_reads_the_settings_again_without_losing_a_job(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(workers=None, preload=None, memory_budget=None)
    write_settings(supervisor, workers=1, memory_budget=1000)
    reload(supervisor)
    supervisor.wait_idle(1)
    job = jobs.gated()
    main = psutil.Process(job.wait_started())
    old = supervisor.warm_interpreter()
    write_settings(supervisor, workers=2, memory_budget=2000, preload="wave")
    reload(supervisor)
    assert is_alive(main)
    loaded = jobs.run("import sys; print('wave' in sys.modules)")
    assert jobs.output(loaded["_id"]) == b"True\n"
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)
    supervisor.wait_idle(2)
    assert supervisor.warm_interpreter() != old
    assert supervisor.metric("memory_budget_bytes") == 2000 * 2**20


def test_a_reload_with_a_wrong_setting_changes_nothing(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(workers=None)
    write_settings(supervisor, workers="many")
    supervisor.signal(signal.SIGHUP)
    wait_until(lambda: "reload_refused" in supervisor.log(), what="the refusal")
    assert "SUPERVISOR_WORKERS" in supervisor.log()
    assert jobs.run("pass")["status"] == "completed"


@pytest.mark.parametrize("setting", ["mongo_db", "mongo_collection", "data_dir"])
def test_a_reload_cannot_move_to_another_database(start_supervisor: Start, jobs: Jobs, setting: str) -> None:
    supervisor = start_supervisor(**{setting: None})
    job = jobs.gated()
    if setting != "mongo_db":
        job.wait_started()
    write_settings(supervisor, **{setting: "another"})
    supervisor.signal(signal.SIGHUP)
    wait_until(lambda: f"SUPERVISOR_{setting.upper()}: cannot change" in supervisor.log(), what="the refusal")
    if setting != "mongo_db":
        assert job.finish()["attempts"] == 1


def test_jobs_go_on_while_a_reload_imports_for_long(start_supervisor: Start, jobs: Jobs) -> None:
    """The old pool works until the new interpreter is ready, and the counters go on."""
    gate = jobs.directory / "gate"
    source = f"import os, time\nwhile os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    modules = jobs.directory / "modules"
    modules.mkdir()
    (modules / "slowly.py").write_text(source)
    supervisor = start_supervisor(preload="slowly", module_path=modules)
    assert jobs.run("pass")["status"] == "completed"
    old = supervisor.warm_interpreter()
    gate.touch()
    reload(supervisor)
    for _ in range(3):
        assert jobs.run("pass")["status"] == "completed"
    assert supervisor.is_ready()
    gate.unlink()
    wait_until(lambda: supervisor.warm_interpreter() not in (old, 0), what="the new interpreter")
    supervisor.wait_idle(2)
    assert jobs.run("pass")["status"] == "completed"
    wait_until(lambda: supervisor.metric("jobs_finished_total", status="completed") == 5, what="the count")


def test_many_reloads_at_once(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.gated()
    job.wait_started()
    for _ in range(8):
        send_and_see(supervisor, signal.SIGHUP)
    document = job.finish()
    assert (document["status"], document["attempts"]) == ("completed", 1)
    supervisor.wait_idle(2)
    assert jobs.run("pass")["status"] == "completed"


def test_sigusr1_writes_the_state_of_the_pool(supervisor: RunningSupervisor, jobs: Jobs) -> None:
    job = jobs.gated()
    job.wait_started()
    supervisor.signal(signal.SIGUSR1)
    wait_until(lambda: f"job_id={job.id}" in supervisor.log(), what="the report")
    job.finish()


# -- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("workers", "many"),
        ("workers", "0"),
        ("lease_seconds", "-1"),
        ("start_method", "hot"),
        ("memory_budget", "0"),
        ("memory_check_interval", "nan"),
        ("poll_interval", "0"),
        ("kill_grace", "inf"),
        ("log_level", "loud"),
        ("metrics_port", "70000"),
        ("mongo_uri", "localhost:27017"),
        ("mongo_uri", "mongodb://"),
        ("mongo_uri", "mongodb://user:secret@host:port/"),
        ("task_roots", "/no/such/directory"),
        ("python", "/no/such/python"),
        ("env_file", "/no/such/file"),
    ],
)
def test_a_wrong_setting_stops_the_start(
    tmp_path: Path, mongo_uri: str, db_name: str, setting: str, value: str
) -> None:
    other = RunningSupervisor(tmp_path, mongo_uri, db_name)
    other.environment[f"SUPERVISOR_{setting.upper()}"] = value
    ended = other.command("run")
    assert ended.returncode == 2
    assert f"SUPERVISOR_{setting.upper()}" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "secret" not in ended.stderr


def test_a_taken_port_stops_the_start(supervisor: RunningSupervisor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        supervisor.environment["SUPERVISOR_METRICS_PORT"] = str(taken.getsockname()[1])
        ended = supervisor.command("run")
    assert ended.returncode == 2
    assert "SUPERVISOR_METRICS_PORT" in ended.stderr


def test_without_a_port_there_is_no_server(start_supervisor: Start, jobs: Jobs) -> None:
    supervisor = start_supervisor(metrics_port=0, ready=False)
    assert jobs.run("pass")["status"] == "completed"
    listening = [c for p in supervisor.everything() for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_start_that_waits_for_mongodb_can_be_ended(
    start_supervisor: Start, mongo_server: MongoServer, number: signal.Signals
) -> None:
    mongo_server.stop()
    try:
        supervisor = start_supervisor(ready=False)
        waiting = wait_until(supervisor.tree, what="it to knock at MongoDB")
        supervisor.signal(signal.SIGHUP)
        supervisor.signal(number)
        assert supervisor.wait() == 0
        assert "Traceback" not in supervisor.log()
        wait_gone(waiting)
    finally:
        mongo_server.start()


ENDED_BESIDE_THE_FORK = """
import os, signal
from supervisor.cli import run

fork = os.fork
def fork_and_be_told_to_end():
    assert len(os.listdir("/proc/self/task")) == 1, "another thread would take the signal, and hold locks"
    pid = fork()
    if pid:
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return pid

os.fork = fork_and_be_told_to_end
signal.signal(signal.SIGTERM, run.end_early)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
try:
    run.check_reachable("mongodb://127.0.0.1:1/")
except run.EndedEarly:
    print("ended early")
"""


def test_who_knocks_at_mongodb_ends_with_a_start_that_did_not_learn_its_pid(tmp_path: Path) -> None:
    said = tmp_path / "said"  # not a pipe, whose end would come with that of the last process
    with said.open("wb") as stdout:
        subprocess.run([sys.executable, "-c", ENDED_BESIDE_THE_FORK], stdout=stdout, timeout=30, check=True)
    pid, outcome = said.read_text().split(maxsplit=1)
    assert outcome.strip() == "ended early"
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_gone([psutil.Process(int(pid))])


def test_a_start_waits_a_moment_for_mongodb(start_supervisor: Start, jobs: Jobs, mongo_server: MongoServer) -> None:
    job_id = jobs.submit(jobs.script("pass"))
    mongo_server.stop()
    try:
        supervisor = start_supervisor(ready=False)
        wait_until(lambda: supervisor.tree(), what="it to knock at MongoDB")
    finally:
        mongo_server.start()
    assert jobs.wait(job_id)["attempts"] == 1
    wait_until(supervisor.is_ready, what="the supervisor to be ready")
    assert supervisor.metric("mongo_up") == 1
