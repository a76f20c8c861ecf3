"""A hard limit of each job's memory, set by the kernel: one control group (cgroup v2) for each slot.

    BASE                     the group that this supervisor was started in, if it was handed over to us
    ├── supervisor           all of ours: a group with limits below it may hold no process itself
    └── job-PID-SLOT         the job of one slot; PID is the supervisor's

Sampling stays the judge: it knows what is the job's own, and explains. The group's limit lies a little above the job's
and stops what sampling cannot, an allocation burst within one interval, and counts what it cannot see: files on tmpfs,
and the kernel's own memory for the job. At the limit the kernel first takes file cache back and swaps, if it can; then
it ends all of the job. When the supervisor dies, its successor removes the groups it left.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LEAF = "supervisor"
MB = 1_048_576
LEAST_SLACK_MB = 32
SLACK_SHARE = 8
KEPT_BYTES = 4 * MB
"""A group that is charged more than this after its job (cached files, say) is made anew for the next one."""


class NoControlGroups(Exception):
    """Why there can be no hard limits here, in a sentence."""


def hard_limit_mb(required_mb: int) -> int:
    """Where the kernel ends a job: page tables, stacks and sockets count here, and are no fault of a job."""
    return required_mb + max(LEAST_SLACK_MB, required_mb // SLACK_SHARE)


# -- the supervisor's side --------------------------------------------------------------------------------------------


class MemoryGroups:
    """The control group that this supervisor was started in, prepared to hold groups with limits."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._handed_down = False

    @classmethod
    def prepare(cls, own_group: Path | None = None) -> MemoryGroups:
        """Moves the calling process into a leaf group and hands the memory controller down; before the first fork.

        Raises NoControlGroups, and has changed nothing, where that cannot be done.
        """
        own = own_group or find_own_group()
        groups = cls(own.parent if own.name == LEAF and _controls(own.parent) else own)
        groups._check_controller()
        try:
            groups._take()
        except OSError as error:
            groups.release()
            raise NoControlGroups(f"{error.strerror}: {error.filename or groups._base}") from None
        groups._remove_stale()
        return groups

    @property
    def prefix(self) -> str:
        """What the path of a slot's group begins with; `SlotGroup` adds the slot's number."""
        return str(self._base / f"job-{os.getpid()}")

    def release(self) -> None:
        """Undoes what can be undone, so that the group is as it was found."""
        for group in self._base.glob(f"job-{os.getpid()}-*"):
            _remove(group)
        if any(self._base.glob("job-*-*")):
            return  # another supervisor's, whose limits would go
        with contextlib.suppress(OSError):  # others of ours may still be in the leaf: then it stays
            if self._handed_down:
                _write(self._base / "cgroup.subtree_control", "-memory")
            _write(self._base / "cgroup.procs", "0")
            (self._base / LEAF).rmdir()

    def _check_controller(self) -> None:
        try:
            controllers = (self._base / "cgroup.controllers").read_text("ascii").split()
        except OSError as error:
            raise NoControlGroups(f"{error.strerror}: {error.filename}") from None
        if "memory" not in controllers:
            raise NoControlGroups(f"the control group {self._base} has no memory controller")

    def _take(self) -> None:
        (self._base / LEAF).mkdir(exist_ok=True)
        _write(self._base / LEAF / "cgroup.procs", "0")
        if not _controls(self._base):
            _write(self._base / "cgroup.subtree_control", "+memory")
            self._handed_down = True
        trial = SlotGroup(f"{self.prefix}-trial")
        trial.limit(LEAST_SLACK_MB)
        pid = os.fork()
        if pid == 0:
            os._exit(_try_to_join(trial))
        error = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        trial.remove()
        if error != 0:
            raise OSError(error, os.strerror(abs(error)))

    def _remove_stale(self) -> None:
        for group in self._base.glob("job-*-*"):
            owner = group.name.split("-")[1]
            if not os.path.exists(f"/proc/{owner}"):
                _remove(group)


def find_own_group() -> Path:
    """The directory of the calling process's group in the v2 hierarchy; raises NoControlGroups."""
    try:
        entries = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines()]
    except OSError:
        raise NoControlGroups("there are no control groups here") from None
    own = next((entry[3:] for entry in entries if entry.startswith("0::")), None)
    for mount in mounts:
        root, place, kind = mount[3], mount[4], mount[mount.index("-") + 1]
        if kind == "cgroup2" and own is not None and Path(own).is_relative_to(root) and ".." not in own:
            return Path(place) / Path(own).relative_to(root)
    raise NoControlGroups("no cgroup v2 hierarchy is mounted here")


def _controls(group: Path) -> bool:
    with contextlib.suppress(OSError):
        return "memory" in (group / "cgroup.subtree_control").read_text("ascii").split()
    return False


def _try_to_join(group: SlotGroup) -> int:
    try:
        group.join()
    except OSError as error:
        return error.errno or 1
    return 0


# -- a runner's side --------------------------------------------------------------------------------------------------


class SlotGroup:
    """The control group of one slot's job, used for one after the other. Every method but `remove` raises OSError."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._procs = -1
        self._kills = 0
        with contextlib.suppress(OSError):  # `limit` tries again, and says why not
            self._create()

    def _create(self) -> None:
        self._path.mkdir(exist_ok=True)
        _write(self._path / "memory.oom.group", "1")  # all of the job ends, not one of its processes
        self._procs = os.open(self._path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def limit(self, required_mb: int) -> None:
        """Makes it ready for a job, before that is forked."""
        if self._procs < 0:
            self._create()
        _write(self._path / "memory.max", str(hard_limit_mb(required_mb) * MB))
        self._kills = self._count_kills()

    def join(self) -> None:
        """Moves the calling process into the group, if there is one; what it starts from then on is in it, too."""
        if self._procs >= 0:
            os.write(self._procs, b"0")

    def has_killed(self) -> bool:
        """Whether the kernel has ended processes here since `limit`."""
        return self._count_kills() > self._kills

    def clear(self) -> None:
        """Forgets a job of which nothing is left, so that its cached files do not count for the next one."""
        if int((self._path / "memory.current").read_text("ascii")) > KEPT_BYTES:
            self.remove()
            self._create()

    def remove(self) -> None:
        if self._procs >= 0:
            os.close(self._procs)
            self._procs = -1
        _remove(self._path)

    def _count_kills(self) -> int:
        for line in (self._path / "memory.events").read_text("ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0


def _write(path: Path, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode("ascii"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        group.rmdir()
