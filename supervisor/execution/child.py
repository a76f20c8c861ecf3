"""What happens in a job's own process before user code runs, and in the warm interpreter to make that cheap.

    runner ──fork──► enter() ──► execute()                 a fresh interpreter, or
                             ──► run()        the script in the warm interpreter: script.py, ending.py

`prepare_warm` is called once by the warm interpreter before it forks. In the child every touched page is copied, so
whatever can be known before the fork is known before the fork. When the runner dies, the kernel kills the job's
process; an error before user code is raised to the caller, which reports it and exits.
"""

from __future__ import annotations

import _signal
import contextlib
import faulthandler
import gc
import itertools
import os
import sys
import sysconfig
import time
from _signal import SIG_SETMASK, SIGKILL, getsignal, pthread_sigmask, set_wakeup_fd, signal
from dataclasses import dataclass, field, replace

# By these names a new process finds them without writing to a page.
from os import closerange, dup2, getpid, getsid, setsid
from types import CodeType, ModuleType
from typing import Any, NoReturn

from supervisor.execution import ending, fork_hooks, huge_pages, script
from supervisor.execution.eligibility import why_not_warm as why_not_warm
from supervisor.execution.libraries import Libraries
from supervisor.execution.seeds import NumpySeed
from supervisor.execution.title import ProcessTitle
from supervisor.processes import become_user, die_with_parent

_PYTHON_HANDLERS: dict[int, Any] = {
    **{getattr(_signal, name): _signal.SIG_IGN for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ") if hasattr(_signal, name)},
    _signal.SIGINT: _signal.default_int_handler,
}
_CHANGED_BY_RUNNER = (_signal.SIGCHLD, _signal.SIGINT, _signal.SIGTERM)
TRACEBACK_SIGNAL = int(getattr(_signal, "SIGRTMAX", 0)) - 1
"""Makes a warm job write where its threads are to its standard error; hardly any program uses this signal."""
_REHEARSAL = b"""import os, sys, time
class Thing:
    def method(self, *values): return [value for value in values if value]
def function(text="a", **options): return f"{text} {options}"
try:
    {}["missing"]
except KeyError as error:
    print("", end="", file=sys.stdout)
Thing().method(1, 2.5, None, function(x=1), os.path.join("a", "b"), time.time())
"""
_REHEARSALS = 30
_FORK_HOOKS = (
    ("threading", "_after_fork"), ("random", "seed"), ("logging", "_after_at_fork_child_reinit_locks"),
)  # fmt: skip


@dataclass(slots=True)
class Launch:
    """What one job process executes. `path` becomes sys.argv[0]; `env` is complete, or `adds` to the interpreter's."""

    path: str
    args: list[str]
    env: dict[str, str]
    cwd: str | None
    start_method: str
    python: str
    run_as: list[int] | None = None
    """The user id and the group ids, the primary group first; None: those of the runner."""
    titled: bool = False
    """Whether the process shows the job's command line already: the runner did while it forked."""
    adds: bool = False
    """Mostly three variables are new, and touching the others would copy the pages that they are on."""
    directory: str = ""
    """The one that the script is in, with all links followed, once it was looked for."""
    code: CodeType | None = None
    """The script, where the runner has compiled it."""

    def as_values(self) -> list[Any]:
        """The fields that can be sent, for a message."""
        return [
            self.path,
            self.args,
            self.env,
            self.cwd,
            self.start_method,
            self.python,
            self.run_as,
            self.titled,
            self.adds,
            self.directory,
        ]

    @classmethod
    def from_values(cls, values: list[Any]) -> Launch:
        return cls(*values)

    def executed(self) -> Launch:
        """The same, in a fresh interpreter."""
        return replace(self, start_method="exec")


@dataclass(slots=True)
class _Warm:
    """What `prepare_warm` has found out, for the children."""

    environment: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    """What os.environ has beyond that: it is set before the fork, and stays until the next job."""
    title: ProcessTitle | None = None
    seed: NumpySeed | None = None
    libraries: Libraries | None = None
    signals_of_python: tuple[tuple[int, Any], ...] = ()
    """What an interpreter does with them from its start on, where the runner does something else."""
    signals_of_others: tuple[tuple[int, Any], ...] = ()
    """The same for a program that is executed."""
    kept: list[object] = field(default_factory=list)
    """What must never be freed in a job: freeing closes descriptors and costs."""


_warm = _Warm()
_HAS_CLOSE_RANGE = bool(sysconfig.get_config_var("HAVE_CLOSE_RANGE"))
"""os.closerange() is one system call then; without it, it would try two thousand million descriptors."""
_LAST_DESCRIPTOR = 0x7FFF_FFFE
_SAFE_PATH = sys.flags.safe_path


# -- in the warm interpreter, once ------------------------------------------------------------------------------------


def prepare_warm() -> None:
    """Makes the forks cheap and exact. Called last before forking, when everything to be shared is loaded."""
    _open_streams_as_on_pipes()
    _warm.environment = dict(os.environ)
    _warm.title = ProcessTitle.of_this_process(_warm.environment)
    _warm.signals_of_python = _other_than_in_runner(_PYTHON_HANDLERS)
    _warm.signals_of_others = _other_than_in_runner({})
    _warm.seed = NumpySeed.of_this_process()
    _warm.libraries = Libraries.of_this_process()
    if TRACEBACK_SIGNAL > 0:
        faulthandler.register(TRACEBACK_SIGNAL, file=2, all_threads=True)
    gc.collect()
    _rehearse()
    forget_ourselves()
    gc.unfreeze()  # each rehearsal has frozen what the one before it left
    gc.collect()
    gc.freeze()  # a collection in a child then leaves all shared objects alone
    huge_pages.gather()


def _rehearse() -> None:
    """Goes often through what every child does, without its effects.

    A function writes into its own code while it becomes warm, and the C library binds a function at its first call:
    done here, these writes do not copy a page in each child.
    """
    modules: dict[str, Any] = sys.modules
    for _ in range(_REHEARSALS):
        for name, hook in _FORK_HOOKS:
            if name in modules:
                with contextlib.suppress(AttributeError):  # another version of Python
                    getattr(modules[name], hook)()
        _set_environment(_warm.environment)
        _renew_preloaded_state()
        script.kept(os.devnull, "")
        warm_up()


def warm_up() -> None:
    """Goes through what a job does first and last. A child that waits for its job has these pages of its own then."""
    interrupt = _signal.getsignal(_signal.SIGINT)
    _set_signals(_warm.signals_of_python)
    _close_range(_LAST_DESCRIPTOR, _LAST_DESCRIPTOR)
    if _warm.seed is not None:
        _warm.seed.renew()
    _rehearse_script()
    _signal.signal(_signal.SIGINT, interrupt)


def _rehearse_script() -> None:
    main, argv, orig_argv, path = sys.modules["__main__"], sys.argv[:], sys.orig_argv[:], sys.path[:]
    script.load(os.devnull)
    launch = Launch("<rehearsal>", [], {"JOB_ID": "rehearsal"}, None, "warm", sys.executable, adds=True)
    rehearsal = _set_up(launch, sys.path[0])
    exec(compile(_REHEARSAL, "<rehearsal>", "exec", dont_inherit=True), rehearsal.__dict__)
    ending.rehearse(id(rehearsal.__dict__), _warm.libraries)
    fork_hooks.activate(False)
    _add_to_environment({})
    if _warm.title is not None:
        _warm.title.set(orig_argv, {}, adds=True)
    sys.argv[:], sys.orig_argv[:], sys.path[:] = argv, orig_argv, path
    sys.modules["__main__"] = main


def _open_streams_as_on_pipes() -> None:
    """Opens stdout and stderr anew as they are on a pipe: they remember whether what they were opened on can seek."""
    reader, writer = os.pipe()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        saved = os.dup(descriptor)
        os.dup2(writer, descriptor)
        stream = script.standard_stream(descriptor, name, old.encoding, old.errors)
        os.dup2(saved, descriptor)
        os.close(saved)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.close(reader)
    os.close(writer)


# -- in the runner, for each job --------------------------------------------------------------------------------------


def keep(owner: object) -> None:
    """The owner of descriptors that a job closes: freed in a job, it would close one of the job's."""
    _warm.kept.append(owner)


def before_fork(launch: Launch) -> Launch:
    """Does here what a child would do at the price of copied pages: shows the job's command line, compiles its script,
    and sets its variables.

    `after_fork` takes the command line back.
    """
    if launch.start_method != "warm" or _warm.title is None:
        return launch
    keep_compiled(launch)
    _warm.title.set([launch.python, launch.path, *launch.args], launch.env, adds=launch.adds)
    launch.titled = True
    if launch.adds:
        _add_to_environment(launch.env)
    return launch


def keep_compiled(launch: Launch) -> None:
    """Compiles the script, if it is one that runs again and again, for all jobs that are forked from now on."""
    if launch.start_method == "warm" and launch.run_as is None and os.path.isabs(launch.path):
        launch.code = script.compiled(launch.path, launch.directory)


def after_fork(launch: Launch) -> None:
    """To be called in the runner alone."""
    if launch.titled and _warm.title is not None:
        _warm.title.restore()


# -- in the job's process ---------------------------------------------------------------------------------------------


def enter(
    launch: Launch, stdin_fd: int, stdout_fd: int, stderr_fd: int, *, runner_pid: int, kept_fd: int | None = None
) -> None:
    """Becomes a process of its own with these standard streams, and nothing else of the runner's but `kept_fd`.

    The umask stays. The descriptors given are above 2. Raises OSError.
    """
    set_wakeup_fd(-1)
    die_with_parent(runner_pid, SIGKILL)
    if getsid(0) != getpid():  # a spare has a session of its own already
        setsid()
    _set_signals(_warm.signals_of_python)
    dup2(stdin_fd, 0)
    dup2(stdout_fd, 1)
    dup2(stderr_fd, 2)
    if kept_fd is None:
        _close_range(3, _LAST_DESCRIPTOR)
    else:
        _close_range(3, kept_fd - 1)
        _close_range(kept_fd + 1, _LAST_DESCRIPTOR)
    if launch.run_as is not None:
        _become_user(launch.run_as, runner_pid)
    if launch.cwd is not None:
        os.chdir(launch.cwd)


def _become_user(ids: list[int], runner_pid: int) -> None:
    for descriptor in (1, 2):
        os.fchown(descriptor, ids[0], ids[1])  # or the job could not open /dev/stdout
    become_user(ids)
    die_with_parent(runner_pid, _signal.SIGKILL)


def _other_than_in_runner(handlers: dict[int, Any]) -> tuple[tuple[int, Any], ...]:
    """Of these handlers, and the default for all other signals, those that may be set differently in the runner."""
    wanted = {number: handlers.get(number, _signal.SIG_DFL) for number in range(1, _signal.NSIG)}
    return tuple(
        (number, handler)
        for number, handler in wanted.items()
        if number in _CHANGED_BY_RUNNER or _signal.getsignal(number) not in (handler, None)
    )


def _set_signals(handlers: tuple[tuple[int, Any], ...]) -> None:
    for number, handler in handlers:
        before = getsignal(number)
        if before != handler and before is not None:
            signal(number, handler)
    pthread_sigmask(SIG_SETMASK, ())


def _close_range(first: int, last: int) -> None:
    if _HAS_CLOSE_RANGE:
        closerange(first, last + 1)
        return
    for name in os.listdir("/dev/fd"):  # an old kernel or C library, or not Linux
        if first <= int(name) <= last:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(int(name))


def execute(launch: Launch) -> NoReturn:
    """Becomes a fresh interpreter that runs the script. Raises OSError."""
    _set_signals(_warm.signals_of_others)
    env = {**_warm.environment, **launch.env} if launch.adds else launch.env
    os.execve(launch.python, [launch.python, launch.path, *launch.args], env)


def run(launch: Launch) -> NoReturn:
    """Runs the script as `python script.py args` would, and ends the process as the interpreter does.

    Source that does not compile, a .pyc or a zip file is executed by a fresh interpreter in this process's place:
    its message is exact, and nothing has happened yet. Called at the bottom of the stack.
    """
    try:
        code = launch.code or script.kept(launch.path, launch.directory)
        directory = launch.directory
        if code is None:
            code, directory = script.load(launch.path)
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        try:
            execute(launch)
        except OSError as error:
            os.write(2, f"{launch.python}: cannot be executed: {error.strerror}\n".encode())
            os._exit(127)
    errors: list[BaseException] = []
    main = _set_up(launch, directory)
    try:
        exec(code, main.__dict__)
    except BaseException as error:
        errors.append(error)  # reported outside of this block, or it would be the context of what comes then
    del main, code
    ending.end(errors, _warm.libraries)


def _set_up(launch: Launch, directory: str) -> ModuleType:
    """Makes everything as the script expects it, and returns its `__main__`."""
    fork_hooks.activate()
    path, arguments = launch.path, launch.args
    if launch.adds:
        _add_to_environment(launch.env)
    else:
        _set_environment(launch.env)
    if _warm.title is not None and not launch.titled:
        _warm.title.set([launch.python, path, *arguments], launch.env, adds=launch.adds)
    _renew_preloaded_state()
    sys.argv[:] = [path, *arguments]
    sys.orig_argv[:] = [launch.python, path, *arguments]
    if _SAFE_PATH:
        del sys.path[0]
    else:
        sys.path[0] = directory
    gc.freeze()  # what the runner has left here is no more of a collection's business than what was preloaded
    return script.new_main(path)


def forget_ourselves() -> None:
    """A job's own `import supervisor` is its own business. Ours live on, unnamed: freeing them would cost.

    Once, in the warm interpreter: from here on nothing of ours is imported, neither there nor in a runner.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "supervisor"]:
        _warm.kept.append(sys.modules.pop(name))


def _add_to_environment(env: dict[str, str]) -> None:
    """Makes os.environ and the C library's environment those of the start, and `env` behind them.

    What was added for the job before goes. Mostly it has the same names, and hardly anything is to be changed.
    """
    before = _warm.added
    if env is before:
        return
    _warm.added = env
    if list(env) == list(before):
        for name, value in env.items():
            if value != before[name]:
                os.environ[name] = value
    else:
        for name in before:
            if name in _warm.environment:
                os.environ[name] = _warm.environment[name]
            else:
                del os.environ[name]
        os.environ.update(env)
    if "TZ" in env or "TZ" in before:
        time.tzset()


def _set_environment(env: dict[str, str]) -> None:
    """Makes os.environ and the C library's environment `env`, touching only what differs."""
    _add_to_environment({})
    base = _warm.environment
    for name, value in env.items():
        if base.get(name) != value:
            os.environ[name] = value
    for name in base:
        if name not in env:
            del os.environ[name]
    if base.get("TZ") != env.get("TZ"):
        time.tzset()


def _renew_preloaded_state() -> None:
    """What modules remember of their process or draw once, and a fresh interpreter would have anew."""
    modules: dict[str, Any] = sys.modules
    if "logging" in modules:
        logging = modules["logging"]
        logging._startTime = time.time_ns() if isinstance(logging._startTime, int) else time.time()
    if "tempfile" in modules:
        modules["tempfile"].tempdir = None
    if "multiprocessing.process" in modules:
        process = modules["multiprocessing.process"]
        process._current_process = type(process._current_process)()  # draws a new authkey
        process._process_counter = itertools.count(1)
        process.ORIGINAL_DIR = os.getcwd()
    if _warm.seed is not None:
        _warm.seed.renew()
