"""A real `python -m supervisor` for tests, and what they want to know of it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from pymongo.collection import Collection

from supervisor import JobManager
from supervisor.store.jobs import possible_ids
from tests.support.waiting import wait_until

Document = dict[str, Any]
PYTHON = sys.executable
_DIE_WITH_PARENT = (  # when the test run is killed, its supervisors are, too
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)
REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class RunningSupervisor:
    """One supervisor process, its settings, and its children."""

    def __init__(self, directory: Path, mongo_uri: str, db_name: str, **settings: object) -> None:
        self.directory = directory
        self.mongo_uri = mongo_uri
        self.db_name = db_name
        self.port = int(str(settings.pop("metrics_port", free_port())))
        module_path = settings.pop("module_path", None)
        self.address = str(settings.get("metrics_host", "127.0.0.1"))
        chosen = {
            "mongo_uri": mongo_uri,
            "mongo_db": db_name,
            "workers": 2,
            "metrics_port": self.port,
            "task_roots": f"{directory},{REPOSITORY / 'tasks'}",
            "memory_budget": 4096,
            "kill_grace": 1,
            "shutdown_timeout": 10,
            **settings,
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SUPERVISOR_")}
        self.environment = clean | {
            f"SUPERVISOR_{name.upper()}": str(value) for name, value in chosen.items() if value is not None
        }
        if module_path is not None:
            self.environment["PYTHONPATH"] = f"{module_path}:{os.environ.get('PYTHONPATH', '')}"
        self.log_path = directory / f"supervisor-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    # -- life

    def start(self, *, ready: bool = True, timeout: float = 60) -> RunningSupervisor:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), PYTHON, "-m", "supervisor"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if ready:
            what = "the supervisor to be ready"
            wait_until(self.is_ready, timeout=timeout, what=lambda: f"{what}:\n{self.log()[-3000:]}")
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self, timeout: float = 60) -> int:
        """Drains it as an operator would; returns the exit code."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """kill -9 of the supervisor alone."""
        self.signal(signal.SIGKILL)
        self.wait()

    # -- what it says

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def get(self, path: str, accept: str = "*/*") -> tuple[int, str]:
        request = urllib.request.Request(f"http://{self.address}:{self.port}{path}", headers={"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (OSError, http.client.HTTPException):  # the keeper, which answers, may be replaced meanwhile
            return 0, ""

    def is_ready(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the supervisor ended with {self.process.returncode}:\n{self.log()[-3000:]}")
        return self.get("/readyz")[0] == 200

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample, or the sum of those with these labels (`supervisor_` may be left out); else 0."""
        wanted = name if name.startswith(("supervisor_", "process_")) else f"supervisor_{name}"
        return sum(
            float(sample.value)
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == wanted and labels.items() <= sample.labels.items()
        )

    def wait_idle(self, workers: int, timeout: float = 30) -> None:
        """Until so many workers are up, nothing runs, and it says that it is ready."""
        wait_until(
            lambda: (
                self.metric("workers", state="idle") == workers
                and self.metric("workers", state="busy") + self.metric("workers", state="starting") == 0
                and self.is_ready()
            ),
            timeout=timeout,
            what=lambda: f"{workers} idle workers:\n{self.log()[-3000:]}",
        )

    # -- its processes

    def tree(self) -> list[psutil.Process]:
        """Everything below it."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[int]:
        """The PIDs of its workers, from its own report."""
        return self._reported("worker_pid")

    def runners(self) -> list[int]:
        return self._reported("runner_pid")

    def warm_interpreter(self) -> int:
        return self._reported_by_pool("warm_pid")

    def keeper(self) -> int:
        return self._reported_by_pool("keeper_pid")

    def lookout(self) -> int:
        return self._reported_by_pool("lookout_pid")

    def everything(self) -> list[psutil.Process]:
        return [psutil.Process(self.pid), *self.tree()]

    def _report(self) -> list[dict[str, str]]:
        """SIGUSR1 writes the state of the pool to the log."""
        before = len(self.log())
        self.signal(signal.SIGUSR1)
        wait_until(lambda: " pool " in self.log()[before:] and "announced=" in self.log()[before:], what="the report")
        rows = []
        for line in self.log()[before:].splitlines():
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            words["event"] = next(iter(line.split()[3:4]), "")
            rows.append(words)
        return rows

    def _reported(self, key: str) -> list[int]:
        return [int(row[key]) for row in self._report() if row["event"] == "slot"]

    def _reported_by_pool(self, key: str) -> int:
        return next(int(row[key]) for row in self._report() if row["event"] == "pool")

    # -- commands

    def command(
        self, *arguments: str, module: str = "supervisor", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command against the same database."""
        return subprocess.run(
            [PYTHON, "-m", module, *arguments],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def json(self, *arguments: str) -> Any:
        return json.loads(self.command(*arguments, "--json").stdout)


NO_OP = "pass"
GATED = """
import os, sys, time

def note(kind):
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    os.write(record, f"{kind} {os.environ['JOB_ATTEMPT']} {os.getpid()} {now}\\n".encode())

path = sys.argv[1]
record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
note("main")
print("begun", flush=True)
while not os.path.exists(path + ".open"):
    time.sleep(0.01)
    note("beat")
"""
FAMILY = """
import os, sys, time

def note(kind):
    os.write(record, f"{kind} {os.environ['JOB_ATTEMPT']} {os.getpid()} 0\\n".encode())

path = sys.argv[1]
record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
if os.fork() == 0:
    if os.fork() == 0:
        note("grandchild")
        time.sleep(3600)
    note("child")
    time.sleep(3600)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note("daemon")
        if "--hide" in sys.argv:
            os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(3600)"], {})
        time.sleep(3600)
    os._exit(0)
note("main")
while not os.path.exists(path + ".open"):
    time.sleep(0.01)
"""
"""Its child, grandchild and daemon (with `--hide` one without an environment) outlive it."""


class GatedJob:
    """A job that goes on until it is let go, and what it wrote down meanwhile."""

    def __init__(self, jobs: Jobs, path: Path, **fields: Any) -> None:
        self.jobs = jobs
        self.path = path
        source, arguments = fields.pop("source", GATED), fields.pop("arguments", [])
        self.script = jobs.script(source, f"{path.name}.py")
        self.id = jobs.submit(self.script, path, *arguments, **fields)

    def notes(self, kind: str, attempt: int) -> list[tuple[int, float]]:
        """PID and time of each note of that kind."""
        try:
            lines = [line.split() for line in self.path.read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [(int(line[2]), float(line[3])) for line in lines if line[:2] == [kind, str(attempt)]]

    def wait_started(self, attempt: int = 1, timeout: float = 30) -> int:
        """The PID of its main process."""
        wait_until(
            lambda: self.notes("main", attempt),
            timeout=timeout,
            what=lambda: f"attempt {attempt} to start: {self.jobs.get(self.id)}",
        )
        return self.notes("main", attempt)[0][0]

    def wait_family(self, attempt: int = 1) -> list[psutil.Process]:
        """Every process of an attempt with the source `FAMILY`."""
        kinds = ("main", "child", "grandchild", "daemon")
        wait_until(lambda: all(self.notes(kind, attempt) for kind in kinds), what="the family to be complete")
        return [psutil.Process(self.notes(kind, attempt)[0][0]) for kind in kinds]

    def let_go(self) -> None:
        Path(f"{self.path}.open").touch()

    def finish(self, *statuses: str, timeout: float = 60) -> Document:
        self.let_go()
        return self.jobs.wait(self.id, *statuses, timeout=timeout)

    def get(self) -> Document:
        return self.jobs.get(self.id)


class Jobs:
    """Jobs of one test: scripts are written, submitted and waited for."""

    def __init__(self, directory: Path, manager: JobManager) -> None:
        self.directory = directory
        self.manager = manager
        self._numbers = itertools.count(1)

    gated_source = GATED

    @property
    def collection(self) -> Collection[Document]:
        """The collection itself: for programs that know nothing of us."""
        return self.manager.jobs.collection

    def gated(self, **fields: Any) -> GatedJob:
        """A job that runs until it is let go."""
        return GatedJob(self, self.directory / f"gated-{next(self._numbers)}", **fields)

    def family(self, *, hide: bool = False, **fields: Any) -> GatedJob:
        """A gated job with a child, a grandchild and a daemon."""
        return self.gated(source=FAMILY, arguments=["--hide"] if hide else [], **fields)

    def run(self, source: str, *arguments: object, **fields: Any) -> Document:
        """Runs a script to its end."""
        script = self.script(source, f"script-{next(self._numbers)}.py")
        return self.wait(self.submit(script, *arguments, **fields))

    def insert(self, **fields: Any) -> Any:
        """Inserts a document as a program does that only knows the driver; `...` leaves a field out."""
        now = datetime.now(UTC)
        document = {
            "request_name": "foreign",
            "status": "pending",
            "created_at": now,
            "updated_at": now,
            "scheduled_date": now,
            "python_path": str(self.directory / "no_op.py"),
            "python_args": [],
            "required_memory": 128,
            "logs": [],
            **fields,
        }
        (self.directory / "no_op.py").write_text(NO_OP)
        kept = {name: value for name, value in document.items() if value is not ...}
        return self.collection.insert_one(kept).inserted_id

    def script(self, source: str, name: str = "job.py") -> Path:
        path = self.directory / name
        path.write_text(source, "utf-8")
        return path

    def submit(self, script: str | Path, *arguments: object, **fields: Any) -> str:
        name = fields.pop("request_name", "test")
        return self.manager.create_job(name, str(script), [str(argument) for argument in arguments], **fields)

    def get(self, job_id: Any) -> Document:
        document = self.collection.find_one({"_id": {"$in": possible_ids(job_id)}})
        assert document is not None, f"there is no job {job_id}"
        return document

    def wait(self, job_id: Any, *statuses: str, timeout: float = 60) -> Document:
        """The document, once its status is one of these (without any: a final one)."""
        wanted = statuses or ("completed", "failed", "cancelled")
        wait_until(
            lambda: self.get(job_id).get("status") in wanted,
            timeout=timeout,
            what=lambda: f"job {job_id} to be {' or '.join(wanted)}, it is {self.get(job_id)}",
        )
        return self.get(job_id)

    def output(self, job_id: Any, stream: str = "stdout", attempt: int = 1) -> bytes:
        document = self.get(job_id)
        chunks = self.manager.output.read(document["_id"], attempt)
        return b"".join(chunk.data for chunk in chunks if chunk.stream == stream)


@contextlib.contextmanager
def running_supervisor(
    directory: Path, mongo_uri: str, db_name: str, *, ready: bool = True, **settings: object
) -> Iterator[RunningSupervisor]:
    """A supervisor that is ready; drained at the end, with everything below it verified to be gone."""
    supervisor = RunningSupervisor(directory, mongo_uri, db_name, **settings)
    try:
        supervisor.start(ready=ready)
        yield supervisor
    finally:
        end(supervisor)


def end(supervisor: RunningSupervisor) -> None:
    """Stops a supervisor in whatever state, and asserts that no process of it is left."""
    tree = supervisor.tree()
    if supervisor.process is not None and supervisor.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            supervisor.signal(signal.SIGCONT)
            supervisor.signal(signal.SIGQUIT)
        try:
            supervisor.wait(30)
        except subprocess.TimeoutExpired:
            supervisor.kill()
    wait_until(
        lambda: not [process for process in tree if is_alive(process)],
        timeout=20,
        what=lambda: f"no process to be left: {[process for process in tree if is_alive(process)]}",
    )


def kill_at_once(processes: Iterable[psutil.Process]) -> None:
    """kill -9 of all of them at the same moment: none sees another one's end."""
    chosen = list(processes)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def wait_gone(processes: Iterable[psutil.Process], within: float = 2.0) -> None:
    """Fails when one of them still lives after so many seconds."""
    chosen = list(processes)
    wait_until(
        lambda: not any(map(is_alive, chosen)),
        timeout=within,
        what=lambda: f"the end of {[process for process in chosen if is_alive(process)]}",
    )


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
