"""What the processes of one supervisor tell each other, and the channel that carries it.

Facts are in the past tense, orders in the imperative. A channel is a Unix socket that keeps message borders; its end
closes with its process, so `ChannelClosed` is how a process learns that its peer is dead. File descriptors travel
with a message. Every message is one small array, written by marshal: both ends run the same interpreter, and unlike
JSON it has no code in Python, whose pages a runner would copy after every fork. One too large for the socket goes
through an unlinked file.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import select
import socket
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

MAX_INLINE_BYTES = 60_000
"""Above this a message travels through a file: a socket's buffer holds 200 KB by default, of many messages."""
MAX_DESCRIPTORS = 65
_DESCRIPTORS_SPACE = socket.CMSG_SPACE(MAX_DESCRIPTORS * array("i").itemsize)
AHEAD_SECONDS = 0.1
"""So much work, at most, is claimed for a slot before it starts; it goes back when the job that runs takes longer."""

# Operation of a worker or the keeper at MongoDB: name, seconds, whether it succeeded.
Operation = tuple[str, float, bool]


class ChannelClosed(Exception):
    """The other side is gone."""


class ChannelFull(Exception):
    """The other side has not read for a long time: it is stopped, or stuck."""


# -- between the supervisor and everyone ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Answered at once by a healthy main loop."""


@dataclass(frozen=True, slots=True)
class Pong:
    """I am here."""


@dataclass(frozen=True, slots=True)
class Retire:
    """End what you are at, take nothing new, and exit."""


# -- supervisor and worker --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The worker can claim jobs."""

    worker: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim one job of at most `limit_mb`, or up to `count` that need together at most `ahead_mb`, to run one after
    the other. Up to `sure_mb` may start at once; with more, all wait for `Admit`.
    """

    grant: int
    limit_mb: int
    sure_mb: int
    count: int = 1
    ahead_mb: int = 0


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that a worker has locked."""

    token: str
    job_id: str
    attempt: int
    queue: str
    memory_mb: int
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a grant came to: jobs that are locked by this worker now."""

    grant: int
    jobs: list[ClaimedJob]
    waits: bool
    operations: list[Operation]


@dataclass(frozen=True, slots=True)
class Admit:
    """The jobs of the grant fit into the budget: start them."""

    grant: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """They do not fit now: hand them back."""

    grant: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Hand back what was claimed ahead and has not started."""


@dataclass(frozen=True, slots=True)
class NothingDue:
    """The claim found no job (or, with `error`, could not be made)."""

    grant: int
    operations: list[Operation]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """No job of the grant is left to run: the slot may claim. The memory is free when the outcomes are written."""

    grant: int


@dataclass(frozen=True, slots=True)
class Hungry:
    """Jobs are short here (`mean_seconds`), and what was claimed ahead runs out: another grant avoids a pause."""

    mean_seconds: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What the job's tree of processes uses now. From its runner to the supervisor."""

    token: str
    used_mb: int


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """An attempt is over and its outcome is written (or, with `spooled`, safe on disk until MongoDB is back)."""

    token: str
    job_id: str
    attempt: int
    status: str
    reason: str | None
    error: str | None
    exit_code: int | None
    duration_seconds: float
    peak_memory_mb: int | None
    kill_delay_seconds: float | None
    held: bool
    """False: the job was no longer this worker's, and nothing was written."""
    spooled: bool
    cause: str = "shutdown"
    """Why it was handed back, if it was: `shutdown` or `lease_expired`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Attempts are over. `returned` names the tokens of jobs that were handed back without having started."""

    jobs: list[FinishedJob]
    returned: list[str]
    operations: list[Operation]


# -- to and from the runner -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """Run this job. The write ends of its standard output and error travel with the message."""

    token: str
    path: str
    args: list[str]
    env: dict[str, str]
    cwd: str | None
    start_method: str
    python: str
    limit_mb: int
    check_interval_seconds: float
    kill_grace_seconds: float
    timeout_seconds: float | None
    deadline: float
    """On `processes.clock()`: when the lease ends unless it is renewed."""
    memory_warning: bool = False
    oom_score_adj: int = 0
    run_as: list[int] | None = None
    """The user id, then the group ids, the primary group first; None: the supervisor's own."""
    user_env: dict[str, str] | None = None
    """What that user's environment adds to the warm interpreter's, under the job's own."""


@dataclass(frozen=True, slots=True)
class Extend:
    """The lease of this job was renewed until `deadline` (on `processes.clock()`)."""

    token: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Stop:
    """End the job: SIGTERM, and SIGKILL after its grace; at once with `now`. `ending` is a `states.Ending`."""

    token: str
    ending: str
    now: bool = False


@dataclass(slots=True)
class Become:
    """Run this: the values of a `Launch`. From the runner to its spare, with standard output and error; without them
    it is a rehearsal.
    """

    launch: list[Any]


@dataclass(frozen=True, slots=True)
class AtRest:
    """Watch this job; see `memory.rest`. From a runner to the lookout, with a pipe and the files that it names."""

    room: int
    tolerance: int
    interval: float
    children: list[bytes]
    """What the files of children said: that of the runner, then one for each thread."""
    processes: list[tuple[int, int]]
    """How many resident pages and threads each has."""

    def count_files(self) -> int:
        """Of children, and for each process its memory and its threads, and when each thread ran."""
        return len(self.children) + sum(2 + threads for _, threads in self.processes)


@dataclass(slots=True)
class Ended:
    """The job is over, and no process of it is left. From the runner to its worker."""

    token: str
    ending: str
    exit_code: int | None
    error: str | None
    duration_seconds: float
    peak_memory_mb: int | None
    kill_delay_seconds: float | None
    leftovers: int
    """Processes that outlived the script and were ended with it."""
    story: list[str]
    """Further lines for the job's log: why it was not warm, the processes of an overrun, a traceback."""
    samples: list[tuple[float, int]]
    """Seconds since the start, and MB in use."""
    began: float = 0.0
    gone: float = 0.0
    """When it was started, and when nothing of it was left, on `processes.clock()`; 0 if it never had a process."""


# -- supervisor and warm interpreter ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WarmReady:
    """The interpreter has imported what it could; `problems` are sentences about what it could not."""

    pid: int
    modules: list[str]
    problems: list[str]
    usable: bool
    """False: jobs cannot be forked from it (it has threads); they are executed instead."""


@dataclass(frozen=True, slots=True)
class Preloading:
    """The interpreter imports this module now, which may end it."""

    module: str


@dataclass(frozen=True, slots=True)
class ForkRunner:
    """Fork the runner of a slot. Its sockets to its worker and to the supervisor travel with the message."""

    slot: int


@dataclass(frozen=True, slots=True)
class RunnerForked:
    slot: int
    pid: int


@dataclass(frozen=True, slots=True)
class PreloadChanged:
    """The file of a preloaded module has changed: the interpreter should be replaced."""

    module: str


# -- supervisor and keeper --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunningJob:
    """One line of the supervisor's picture of what runs."""

    token: str
    job_id: str
    attempt: int
    worker_pid: int
    memory_mb: int
    used_mb: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Beat:
    """The state of the pool, at least once a second, with what happened since the last one."""

    phase: str
    idle: int
    busy: int
    starting: int
    budget_mb: int
    reserved_mb: int
    used_mb: int
    running: list[RunningJob]
    claimed: list[ClaimedJob]
    finished: list[FinishedJob]
    operations: list[Operation]
    restarts: list[str]
    """Reasons, one for each process that was replaced."""
    problems: list[str]
    """Why the pool is not ready; empty when it is."""
    paused: str | None = None
    """Why nothing is claimed although the pool is up."""
    blocked_mb: int = 0
    """Free memory of the budget is this small while something waits for more: look at the head of the queue."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is dead and none of its processes is left: what it held is to be taken back."""

    worker: str
    worker_pid: int
    cause: str


@dataclass(frozen=True, slots=True)
class KeeperReady:
    """The keeper is connected: what an earlier self left behind was taken back, and jobs may be claimed."""


@dataclass(frozen=True, slots=True)
class Wake:
    """`count` jobs have become due, or may have (0: look once)."""

    count: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """The leases of these jobs hold until `deadline` (on `processes.clock()`)."""

    tokens: list[str]
    deadline: float


@dataclass(frozen=True, slots=True)
class LeasesLost:
    """These jobs are no longer ours: they must be stopped, and nothing may be written."""

    tokens: list[str]


@dataclass(frozen=True, slots=True)
class CancelRequested:
    token: str


@dataclass(frozen=True, slots=True)
class StoreState:
    """MongoDB was lost or came back."""

    up: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class QueueHead:
    """The first due job that this supervisor could run in an empty budget; None: nothing waits."""

    memory_mb: int | None


Message = (
    Ping | Pong | Retire | WorkerReady | Claim | Claimed | Admit | Refuse | GiveBack | NothingDue | Released
    | Hungry | Usage | Finished | Run | Extend | Stop | Become | AtRest | Ended | WarmReady | ForkRunner | RunnerForked
    | Preloading | PreloadChanged | Beat | WorkerLost | KeeperReady | Wake | Renewed | LeasesLost | CancelRequested
    | StoreState | QueueHead
)  # fmt: skip

_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in Message.__args__}
_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in _TYPES.values()}
_NESTED: dict[tuple[str, str], type[Any]] = {
    ("Claimed", "jobs"): ClaimedJob,
    ("Finished", "jobs"): FinishedJob,
    ("Beat", "running"): RunningJob,
    ("Beat", "claimed"): ClaimedJob,
    ("Beat", "finished"): FinishedJob,
}
_FIELDS |= {kind: tuple(field.name for field in fields(kind)) for kind in {*_NESTED.values()}}
_NESTED_AT: dict[type[Any], list[tuple[int, type[Any]]]] = {}
for (_kind, _field), _nested in _NESTED.items():
    _NESTED_AT.setdefault(_TYPES[_kind], []).append((_FIELDS[_TYPES[_kind]].index(_field), _nested))


def _values(message: Any) -> list[Any]:
    return [getattr(message, name) for name in _FIELDS[type(message)]]


def encode(message: Message) -> bytes:
    """One message; nested messages become arrays of their fields."""
    kind = type(message)
    values = _values(message)
    if kind in _NESTED_AT:
        for index, _ in _NESTED_AT[kind]:
            values[index] = [_values(entry) for entry in values[index]]
    try:
        return marshal.dumps([kind.__name__, *values])
    except ValueError:  # a kind of str or int of an enum or of MongoDB's, which JSON takes for what it is
        return marshal.dumps(json.loads(json.dumps([kind.__name__, *values])))


def decode(data: bytes) -> Message:
    name, *values = marshal.loads(data)
    kind = _TYPES[name]
    if kind in _NESTED_AT:
        for index, nested in _NESTED_AT[kind]:
            values[index] = [nested(*entry) for entry in values[index]]
    message: Message = kind(*values)
    return message


class Channel:
    """One end of a connection between two processes."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    @classmethod
    def from_descriptor(cls, descriptor: int) -> Channel:
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = (), *, wait: bool = True) -> None:
        """Sends one message; raises `ChannelClosed` when nobody will read it.

        Where there is no room for it, waits for the other side to read; without `wait`, raises `ChannelFull`.
        """
        data = encode(message)
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            if len(data) <= MAX_INLINE_BYTES and not descriptors:
                self._socket.send(data, flags)
            elif len(data) <= MAX_INLINE_BYTES:
                self._send(data, descriptors, flags)
            else:
                with unnamed_file() as file:
                    file.write(data)
                    file.flush()
                    self._send(b"file", [*descriptors, file.fileno()], flags)
        except (BrokenPipeError, ConnectionResetError):
            raise ChannelClosed from None
        except BlockingIOError:
            raise ChannelFull from None

    def _send(self, data: bytes, descriptors: Sequence[int], flags: int) -> None:
        """What `socket.send_fds` does, which ignores its flags."""
        self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))], flags)

    def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors; blocks; raises `ChannelClosed` at the end."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(MAX_INLINE_BYTES + 1, _DESCRIPTORS_SPACE)
        except ConnectionResetError:
            raise ChannelClosed from None
        if not data:
            raise ChannelClosed
        # What `socket.recv_fds` does, whose code and arrays would be more pages for a runner to copy.
        descriptors = [number for _, _, sent in ancillary for number in memoryview(sent).cast("i")]
        if data == b"file":
            data = _contents(descriptors.pop())
        return decode(data), descriptors

    def has_message(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def end(self) -> None:
        """The other side sees the end, behind everything that was sent; what it still says can be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def unnamed_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("message"), "w+b")
    import tempfile  # only here: the warm interpreter, and so every job, would have it and all that it imports

    return tempfile.TemporaryFile()


def _contents(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read()
