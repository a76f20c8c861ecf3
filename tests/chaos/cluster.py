"""What the chaos run runs on: a replica set, and several supervisors, each on what looks to it like its own host."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from supervisor.processes import children, descendants
from tests.chaos.namespaces import Enclosure
from tests.chaos.proxy import Link, Network
from tests.support.mongod import ReplicaSet
from tests.support.running import PYTHON, RunningSupervisor

CLOCK_SOURCE = Path(__file__).with_name("clock.c")
DISK_MB = 4
METRICS_PORT = 9108
PLANTED = Path(__file__).with_name("planted.py")
RUN_VARIABLE = "CHAOS_RUN"


class Members(ReplicaSet):
    """A replica set whose members can be hit one by one."""

    @property
    def ports(self) -> list[int]:
        return [int(host.rpartition(":")[2]) for host in self._hosts]

    def kill_member(self, number: int) -> None:
        self._members[number].end(signal.SIGKILL)

    def start_member(self, number: int) -> None:
        self._members[number].start()

    def pause_member(self, number: int) -> None:
        self._members[number].send(signal.SIGSTOP)

    def resume_member(self, number: int) -> None:
        self._members[number].send(signal.SIGCONT)

    def primary_or(self, other: int) -> int:
        """The primary, or `other` while there is none that can be found at once."""
        from tests.support.mongod import _direct, _hello

        for number, host in enumerate(self._hosts):
            if self._members[number].running and _hello(_direct(host)).get("isWritablePrimary"):
                return number
        return other


class Host(RunningSupervisor):
    """One supervisor in its enclosure (None where the kernel gives us none)."""

    def __init__(
        self,
        number: int,
        directory: Path,
        replica_set: Members,
        network: Network,
        *,
        db_name: str,
        enclosed: bool,
        clock: Path | None,
        bug: str | None,
        **settings: object,
    ) -> None:
        self.number = number
        self._bug = bug
        disk = directory / f"data-{number}"
        disk.mkdir()
        self.enclosure = Enclosure(disk, DISK_MB) if enclosed else None
        self._data = self.enclosure.disk_from_outside if self.enclosure else disk
        if self.enclosure is not None:
            settings["metrics_port"] = METRICS_PORT
        super().__init__(directory, replica_set.uri, db_name, data_dir=disk, **settings)
        self.log_path = directory / f"supervisor-{number}.log"
        self.links: list[Link] = []
        if self.enclosure is not None:
            self.links = [network.add(self.enclosure.listen(port), port) for port in replica_set.ports]
        self.environment[RUN_VARIABLE] = str(directory)
        self._clock_file = directory / f"clock-{number}"
        self.has_own_clock = clock is not None
        if clock is not None:
            self._clock_file.write_bytes(bytes(8))
            self.environment |= {"LD_PRELOAD": str(clock), "CHAOS_CLOCK": str(self._clock_file)}

    # -- life

    def start(self, *, ready: bool = True, timeout: float = 60) -> Host:
        program = [PYTHON, str(PLANTED), self._bug] if self._bug else [PYTHON, "-m", "supervisor"]
        if self.enclosure is not None:
            program = self.enclosure.command(program)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                program,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self.process.returncode if self.process is not None else None

    def last_words(self) -> str:
        return " / ".join(self.log().splitlines()[-3:])

    # -- its processes, found without asking it: it may be stopped

    def tree(self) -> list[int]:  # type: ignore[override]
        return [self.pid, *descendants(self.pid)]

    def _children(self) -> list[int]:
        return children(self.pid) if self.is_running else []

    def _is_warm(self, pid: int) -> bool:
        return any(word.endswith("execution/warm.py") for word in _command_line(pid))

    def warm_interpreters(self) -> list[int]:
        return [pid for pid in self._children() if self._is_warm(pid) and _session(pid) == pid]

    def runners(self) -> list[int]:
        """Forked by a warm interpreter, in its session; jobs have sessions of their own."""
        found = [*self._children(), *(pid for warm in self.warm_interpreters() for pid in children(warm))]
        return [pid for pid in found if self._is_warm(pid) and _session(pid) not in (pid, self.pid, None)]

    def keepers(self) -> list[int]:
        return [pid for pid in self._forked() if _listens(pid)]

    def workers(self) -> list[int]:
        """And the lookout, which looks like them."""
        return [pid for pid in self._forked() if not _listens(pid)]

    def _forked(self) -> list[int]:
        own = _command_line(self.pid)
        return [pid for pid in self._children() if _command_line(pid) == own and _session(pid) == self.pid]

    # -- what it says

    def finished_by_status(self) -> tuple[float, dict[str, float]] | None:
        """When it was started, and its `jobs_finished_total`; None while it does not answer."""
        text = self._metrics()
        if text is None:
            return None
        started, counts = 0.0, dict[str, float]()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "supervisor_jobs_finished_total":
                    status = sample.labels["status"]
                    counts[status] = counts.get(status, 0.0) + sample.value
                elif sample.name == "process_start_time_seconds":
                    started = sample.value
        return started, counts

    def _metrics(self) -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            if self.enclosure is not None:
                connection.sock = self.enclosure.connect(self.port)
                connection.sock.settimeout(1)
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    # -- its disk and its clock

    def fill_disk(self) -> None:
        with contextlib.suppress(OSError), open(self._data / "filler", "ab", buffering=0) as file:
            for block in (65_536, 4096):
                try:
                    while file.write(b"\0" * block):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free_disk(self) -> None:
        (self._data / "filler").unlink(missing_ok=True)

    def spooled(self) -> list[str]:
        """Results that still wait on its disk."""
        results = self._data / "results"
        return sorted(path.name for path in results.iterdir()) if results.is_dir() else []

    def set_clock(self, seconds: int) -> None:
        """What its processes take for the time is off by so much from now on."""
        with open(self._clock_file, "r+b", buffering=0) as file:
            file.write(struct.pack("q", seconds))

    def close(self) -> None:
        if self.is_running:
            self.kill()
        if self.enclosure is not None:
            self.enclosure.close()


class Cluster:
    """The replica set, the network, and the hosts. Use it as a context manager, in the main thread."""

    def __init__(self, directory: Path, *, supervisors: int, bug: str | None, clocks: bool, **settings: object) -> None:
        self.replica_set = Members()
        self.directory = directory
        self.db_name = "chaos"
        self.why_not_enclosed = Enclosure.why_not()
        self.clock = _compiled_clock(directory) if clocks else None
        self._supervisors, self._bug, self._settings = supervisors, bug, settings
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        self.network = Network()
        self.replica_set.__enter__()
        for number in range(self._supervisors):
            host = Host(
                number,
                self.directory,
                self.replica_set,
                self.network,
                db_name=self.db_name,
                enclosed=self.why_not_enclosed is None,
                clock=self.clock,
                bug=self._bug,
                **self._settings,
            )
            self.hosts.append(host)
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.close()
        self.end_leftovers()
        self.network.close()
        self.replica_set.close()

    # -- what is left

    def leftovers(self) -> list[psutil.Process]:
        """Processes of this run, by environment, command line or working directory: none may be left at its end."""
        mark = str(self.directory)
        known = {os.getpid(), *(host.enclosure.pid for host in self.hosts if host.enclosure)}
        return [process for process in psutil.process_iter() if process.pid not in known and _belongs(process, mark)]

    def end_leftovers(self) -> None:
        for process in self.leftovers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _compiled_clock(directory: Path) -> Path | None:
    """The library that steps clocks, or None where there is no C compiler."""
    compiler = shutil.which("cc")
    library = directory / "clock.so"
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, CLOCK_SOURCE], check=True)
    return library


def describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"process {process.pid} (child of {process.ppid()}, {process.status()}): {' '.join(process.cmdline())}"
    return f"process {process.pid}"


def _belongs(process: psutil.Process, mark: str) -> bool:
    def mentions(words: Sequence[str]) -> bool:
        return any(mark in word for word in words)

    for look in (process.cmdline, lambda: [process.cwd()], lambda: list(process.environ().values())):
        with contextlib.suppress(psutil.Error, OSError):
            if mentions(look()):
                return True
    return False


def _command_line(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return []


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listens(pid: int) -> bool:
    """Whether it holds a listening TCP socket of its network namespace."""
    try:
        with open(f"/proc/{pid}/net/tcp", encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
    except OSError:
        return False
    listening = {row[9] for row in rows if row[3] == "0A"}
    return not listening.isdisjoint(_sockets(pid))
