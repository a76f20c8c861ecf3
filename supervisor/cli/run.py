"""`python -m supervisor run`: builds the supervisor from its settings. The one place that knows everybody."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from supervisor import execution, installation
from supervisor.errors import ConfigurationError, StoreUnavailable, SupervisorError, UsageError
from supervisor.events import configure_logging, logger
from supervisor.execution.isolation import why_not_possible
from supervisor.execution.orphans import MARKER, end_orphans, mark_limits, marker
from supervisor.job import lease_margin
from supervisor.keeper import Keeper
from supervisor.leases import LeaseKeeper
from supervisor.lookout import Lookout
from supervisor.memory.cgroup import MemoryGroups, NoControlGroups
from supervisor.messages import Channel
from supervisor.metrics import Metrics
from supervisor.pool import Child, fork
from supervisor.processes import die_with_parent
from supervisor.settings import (
    Settings,
    check_for_supervising,
    is_ours,
    load_settings,
    masked,
    unknown_settings,
)
from supervisor.spool import Spool
from supervisor.store.client import connect, reaching
from supervisor.store.embedded import EmbeddedMongo
from supervisor.store.jobs import JobStore, Observe
from supervisor.store.output import OutputStore
from supervisor.store.supervisors import Identity, SupervisorStore
from supervisor.store.transitions import Owner
from supervisor.supervisor import Supervisor
from supervisor.totals import Totals
from supervisor.web.server import WebServer, listen
from supervisor.worker import Worker

WITHHELD = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What systemd tells the supervisor is none of a job's business."""


FIXED = (
    "mongo_uri", "mongo_db", "mongo_collection", "data_dir", "metrics_host", "metrics_port", "memory_enforcement",
)  # fmt: skip
"""Settings that a reload cannot change: what runs depends on them."""

START_SECONDS = 10.0
"""So long MongoDB may take to answer at the start; later it may be away for as long as it likes."""


class EndedEarly(BaseException):
    """A signal came before the main loop, which drains, was there."""


def end_early(number: int, frame: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.1)  # again, if it is raised where the interpreter drops it, as beside a fork
    raise EndedEarly


def run(settings: Settings) -> int:
    """Supervises until a signal ends it; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(number, end_early)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # there is nothing yet to reload, to show or to resize
    try:
        return _run(settings)
    except EndedEarly:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        return 0


def _run(settings: Settings) -> int:
    check_for_supervising(settings)
    check_data_dir(settings)
    check_isolation(settings)
    conflict = installation.conflicting_distribution()
    if conflict is not None:
        raise UsageError(f"the distribution {conflict} (supervisord) is installed here, too: {installation.advice()}")
    configure_logging(settings.log_format, settings.log_level)
    for name in unknown_settings():
        logger("settings").warning("unknown_setting", name=name, msg="ignored: there is no such setting")
    return Host(settings).run()


def check_reachable(uri: str) -> None:
    """Raises `StoreUnavailable` when MongoDB does not answer, and `UsageError` for a wrong connection string.

    In a process of its own: the driver has threads, and this one is about to fork.
    """
    reader, writer = os.pipe()
    asking = os.getpid()
    pid = fork()
    if pid == 0:
        die_with_parent(asking, signal.SIGKILL)  # a signal may end the parent before it knows this process
        try:
            with reaching(uri):
                connect(uri, app="check", selection_timeout_seconds=START_SECONDS).admin.command("ping")
        except SupervisorError as error:
            kind = b"C" if isinstance(error, ConfigurationError) else b"S"
            os.write(writer, kind + str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as answer:
            problem = answer.read().decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if problem:
        raise (UsageError if problem[0] == "C" else StoreUnavailable)(problem[1:])


def check_data_dir(settings: Settings) -> None:
    """Raises `ConfigurationError` where results could not wait on disk while MongoDB is away."""
    try:
        directory = spool_directory(settings)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{settings.data_dir}: {reason}", setting="DATA_DIR") from None
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigurationError(f"{directory} cannot be written to", setting="DATA_DIR")


def spool_directory(settings: Settings) -> Path:
    """Where results wait."""
    return settings.data_dir.resolve() / "results"


def check_isolation(settings: Settings) -> None:
    """Raises `ConfigurationError` where jobs cannot be isolated as they are to be."""
    if settings.isolation == "pidns":
        reason = why_not_possible()
        if reason is not None:
            raise ConfigurationError(f"PID namespaces cannot be made here: {reason}", setting="ISOLATION")


def memory_groups(settings: Settings) -> MemoryGroups | None:
    """Where the kernel limits the memory of jobs; None: it does not. Raises `ConfigurationError`."""
    if settings.memory_enforcement == "sampling":
        return None
    try:
        return MemoryGroups.prepare()
    except NoControlGroups as error:
        if settings.memory_enforcement == "auto":
            return None
        raise ConfigurationError(f"memory cannot be limited here: {error}", setting="MEMORY_ENFORCEMENT") from None


class Host:
    """Everything that the processes of one supervisor share: built before the first fork, changed by a reload."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._log = logger("supervisor")
        self._http = listen(settings.metrics_host, settings.metrics_port)
        self._embedded: EmbeddedMongo | None = None
        self._groups: MemoryGroups | None = None
        self._uri = settings.mongo_uri
        self._pid = os.getpid()
        self._totals = Totals()
        self._at_lookout, self._to_lookout = Channel.pair()
        self._host = socket.gethostname()
        self._supervisor_id = f"{self._host}-{self._pid}-{secrets.token_hex(4)}"
        self._identity = Identity.of_process(self._supervisor_id, self._host, self._pid)

    def run(self) -> int:
        ended = end_orphans()
        if ended:
            self._log.warning("orphans_ended", count=ended, msg="processes of a supervisor that was killed")
        with contextlib.ExitStack() as cleanup:
            self._groups = memory_groups(self.settings)
            if self._groups is not None:
                cleanup.callback(self._groups.release)
            if not self._uri:
                self._use_embedded(cleanup)
            else:
                check_reachable(self._uri)
                self._log.info("mongodb", uri=masked(self._uri))
            return Supervisor(
                self.settings,
                run_worker=self.run_worker,
                run_keeper=self.run_keeper,
                run_lookout=self.run_lookout,
                start_warm=self.start_warm,
                reload=self.reload,
                spared=self.spared,
                keeper_descriptors=self._keeper_descriptors(),
                lookout_descriptors=[self._at_lookout.fileno()],
            ).run()

    def _use_embedded(self, cleanup: contextlib.ExitStack) -> None:
        self._embedded = EmbeddedMongo(self.settings.data_dir)
        cleanup.callback(self._embedded.stop)
        self._embedded.start()
        self._uri = self._embedded.uri
        self._log.info(
            "embedded_mongodb",
            data_dir=str(self.settings.data_dir),
            msg="using the embedded MongoDB; set SUPERVISOR_MONGO_URI to use another",
        )

    # -- what the forked processes run --------------------------------------------------------------------------------

    def run_worker(self, serial: int, supervisor: Channel, runner: Channel) -> int:
        self._forget_inherited()
        owner = Owner(
            supervisor_id=self._supervisor_id,
            host=self._host,
            worker_pid=os.getpid(),
            worker=f"{self._supervisor_id}/{serial}",
        )
        worker = Worker(
            supervisor,
            runner,
            owner=owner,
            settings=self.settings,
            open_store=lambda observe: self._open_store("worker", observe),
            spool=self._spool(),
        )
        return worker.run()

    def run_keeper(self, supervisor: Channel) -> int:
        die_with_parent(self._pid, signal.SIGKILL)  # even when it is stopped: it holds the HTTP server's port
        metrics = Metrics(
            version=_version(),
            host=self._host,
            supervisor_pid=self._pid,
            queues=self.settings.queues or ("default",),
            memory_enforcement="sampling" if self._groups is None else "cgroup",
        )
        counted = self._totals.kept()
        if counted is not None:
            metrics.carry_on(counted)  # before anybody can read them: a 0 in between would count everything twice
        jobs = self._open_store("keeper", metrics.observe_operation)
        supervisors = SupervisorStore(jobs)
        leases = LeaseKeeper(
            jobs,
            OutputStore(jobs),
            supervisors,
            self._spool(),
            identity=self._identity,
            lease_seconds=self.settings.lease_seconds,
            margin_seconds=lease_margin(self.settings.lease_seconds),
            end_orphans=end_orphans,
        )
        keeper = Keeper(
            supervisor,
            settings=self.settings,
            identity=self._identity,
            jobs=jobs,
            supervisors=supervisors,
            leases=leases,
            metrics=metrics,
            totals=self._totals,
            revive_store=self._embedded.revive if self._embedded else lambda: None,
        )
        if self._http is not None:
            WebServer(self._http, metrics.registry, keeper.health, keeper.readiness).start()
        return keeper.run()

    def run_lookout(self, supervisor: Channel) -> int:
        die_with_parent(self._pid, signal.SIGKILL)
        self._forget_inherited()
        return Lookout(supervisor, self._at_lookout).run()

    def start_warm(self, settings: Settings, fatal: Collection[str]) -> Child:
        """Without the modules of `fatal`. Its arguments end in padding: a job writes its command line over them."""
        ours, theirs = Channel.pair()
        program = [sys.executable, str(Path(execution.__file__).with_name("warm.py"))]
        process = subprocess.Popen(
            [*program, str(theirs.fileno()), self._warm_orders(settings, fatal), "[]", " " * 1024],
            pass_fds=(theirs.fileno(), self._to_lookout.fileno()),
            env=self._environment_of_jobs(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the supervisor alone
        )
        theirs.close()
        mark_limits(process.pid, self._pid)
        process.returncode = 0  # the supervisor reaps all its children itself
        return Child("warm interpreter", process.pid, ours)

    def _warm_orders(self, settings: Settings, fatal: Collection[str]) -> str:
        orders = {
            "preload": settings.preload,
            "fatal": [name for name in settings.preload if name in fatal],
            "oom_score_adj": min(100, settings.oom_score_adj // 2),
            "isolated": settings.isolation == "pidns",
            "memory_groups": self._groups.prefix if self._groups is not None else None,
            "lookout": self._to_lookout.fileno(),
        }
        return json.dumps(orders)

    def _open_store(self, app: str, observe: Observe) -> JobStore:
        settings = self.settings
        patience = max(1.0, min(5.0, settings.lease_seconds / 6))  # a lease outlives some vain attempts
        client = connect(self._uri, app=app, selection_timeout_seconds=patience)
        return JobStore(client, settings.mongo_db, settings.mongo_collection, uri=self._uri, observe=observe)

    def _spool(self) -> Spool:
        return Spool(spool_directory(self.settings))

    def _environment_of_jobs(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not is_ours(name) and name not in WITHHELD and name != MARKER
        }
        return {**kept, MARKER: marker(self._pid)}

    def _keeper_descriptors(self) -> list[int]:
        http = [self._http.fileno()] if self._http is not None else []
        return [self._totals.fileno(), *http]

    def _forget_inherited(self) -> None:
        if self._http is not None:
            self._http.detach()  # closed already; its number may be somebody else's by now

    def spared(self) -> list[int]:
        """Processes that come to the supervisor when their parent ends, and are none of its jobs'."""
        pid = self._embedded.guardian_pid if self._embedded is not None else None
        return [pid] if pid is not None else []

    # -- reload -------------------------------------------------------------------------------------------------------

    def reload(self) -> Settings:
        """The settings as they are now; raises `ConfigurationError`, and changes nothing, when one is wrong."""
        fresh = load_settings()
        check_for_supervising(fresh)
        check_isolation(fresh)
        for name in FIXED:
            if getattr(fresh, name) != getattr(self.settings, name):
                raise ConfigurationError("cannot change while the supervisor runs: restart it", setting=name.upper())
        configure_logging(fresh.log_format, fresh.log_level)
        self.settings = fresh
        return fresh


def _version() -> str:
    from supervisor import __version__

    return __version__
