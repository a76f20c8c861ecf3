"""The warm interpreter: imports what jobs need once, and forks the runners from which jobs are forked.

Run as a file by the supervisor (`python warm.py DESCRIPTOR ORDERS REFUSED PADDING`), never imported by it. It knows
neither MongoDB nor a secret, has no thread, and never runs a job. Preloaded modules are foreign code: one that cannot
be imported is left out with a sentence; one that starts a thread is refused, because a fork would lose that thread,
by executing this file again without it; one that ends this process is left out the next time. When the supervisor
dies the socket closes, and this process ends.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

if __name__ == "__main__":
    # The package is found beside this file; what a job may import from there is the job's own business.
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path[0 : 0 if sys.flags.safe_path else 1] = [package_parent]
    from supervisor.execution import fork_hooks

    fork_hooks.hold_back()

# For the scripts: many import them, and in each job that would take some milliseconds.
import datetime  # noqa: F401
import subprocess  # noqa: F401

from supervisor.execution import child, fork_hooks
from supervisor.execution.child import Launch
from supervisor.execution.runner import Interpreter, Runner
from supervisor.messages import (
    Channel,
    ChannelClosed,
    ForkRunner,
    Ping,
    Pong,
    PreloadChanged,
    Preloading,
    RunnerForked,
    WarmReady,
)
from supervisor.processes import reap, set_oom_score_adj

FILES_INTERVAL_MS = 2000


@dataclass(slots=True)
class Preloaded:
    """What became of the modules that were to be preloaded."""

    imported: list[str] = field(default_factory=list)
    threaded: list[str] = field(default_factory=list)
    """Those that start threads."""
    problems: list[str] = field(default_factory=list)
    """Sentences about the failures."""
    files: set[str] = field(default_factory=set)
    """Of the failures: when one of them changes, it is time to try again."""


def preload(names: list[str], announce: Callable[[str], object]) -> Preloaded:
    """Imports the modules. Each is announced before: it may end this process."""
    done = Preloaded()
    directory = os.getcwd()
    for name in names:
        announce(name)
        try:
            importlib.import_module(name)
        except BaseException as error:  # foreign code: even sys.exit must not end this process
            done.problems.append(f"PRELOAD: {name} cannot be imported: {type(error).__name__}: {error}")
            done.files |= files_of(name, error)
            continue
        finally:
            os.chdir(directory)  # a job begins where the supervisor does
        done.imported.append(name)
        if has_threads_after_fork():
            done.threaded.append(name)
            break
    return done


def files_of(name: str, error: BaseException | None = None) -> set[str]:
    """The module's file, as far as it can be found, and those that the error came through."""
    from importlib.util import find_spec  # only here: what is loaded now, every job has loaded

    files = {error.filename} if isinstance(error, SyntaxError) else set()
    traceback = error.__traceback__ if error is not None else None
    while traceback is not None:
        files.add(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    try:
        spec = find_spec(name)
    except BaseException:  # it imports the packages above, which are foreign code, too
        spec = None
    files.add(spec.origin if spec is not None else None)
    return {file for file in files if file is not None and os.path.isfile(file) and file != __file__}


def has_threads_after_fork() -> bool:
    """Some libraries end their threads when the process forks, and start them again when needed: those are fine."""
    if thread_count() == 1:
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return thread_count() > 1


def thread_count() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        import threading

        return threading.active_count()


def loaded_files(before: set[str]) -> dict[str, tuple[str, float]]:
    """Path → module and modification time, of everything that preloading has loaded."""
    files = {}
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if isinstance(path, str):
            try:
                files[path] = (name, os.stat(path).st_mtime)
            except OSError:
                continue
    return files


class WarmInterpreter:
    """The main loop of the warm interpreter."""

    def __init__(self, supervisor: Channel, interpreter: Interpreter, files: dict[str, tuple[str, float]]) -> None:
        self._supervisor = supervisor
        self._interpreter = interpreter
        self._files = files
        self._wakeup, self._wakeup_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> Runner | None:
        """Forks runners on request. Returns None when the supervisor is gone, and in each runner the runner."""
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._supervisor.fileno(), select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        try:
            while True:
                events = poll.poll(FILES_INTERVAL_MS if self._files else None)
                if not events:
                    self._look_at_files()
                for descriptor, _ in events:
                    if descriptor == self._wakeup:
                        os.read(self._wakeup, 4096)
                        reap()
                    else:
                        runner = self._serve()
                        if runner is not None:
                            return runner
        except ChannelClosed:
            return None

    def _serve(self) -> Runner | None:
        message, descriptors = self._supervisor.receive()
        if isinstance(message, Ping):
            self._supervisor.send(Pong())
        elif isinstance(message, ForkRunner):
            worker, supervisor = descriptors
            try:
                pid = os.fork()
            except OSError:  # no process is left: with the sockets closed, the supervisor tries again later
                pid = -1
            if pid == 0:
                signal.set_wakeup_fd(-1)
                os.close(self._wakeup)
                os.close(self._wakeup_end)
                self._supervisor.close()
                channels = Channel.from_descriptor(worker), Channel.from_descriptor(supervisor)
                return Runner(*channels, self._interpreter, message.slot)
            os.close(worker)
            os.close(supervisor)
            if pid > 0:
                self._supervisor.send(RunnerForked(message.slot, pid))
        return None

    def _look_at_files(self) -> None:
        for path, (module, modified) in self._files.items():
            try:
                changed = os.stat(path).st_mtime != modified
            except OSError:
                changed = True  # replaced or removed: an upgrade is under way
            if changed:
                self._files = {}  # said once; the supervisor replaces this interpreter
                self._supervisor.send(PreloadChanged(module))
                return


def prepare(descriptor: int, orders: dict[str, Any], refused: list[str]) -> WarmInterpreter:
    """Imports, tells the supervisor, and becomes ready to fork."""
    before = set(sys.modules)
    wanted: list[str] = orders["preload"]
    set_oom_score_adj(orders["oom_score_adj"])
    supervisor = Channel.from_descriptor(descriptor)
    fatal: list[str] = orders["fatal"]
    own_path = sys.path.pop(0)
    left_out = {*refused, *fatal}
    done = preload([name for name in wanted if name not in left_out], lambda name: supervisor.send(Preloading(name)))
    failed_files = done.files.union(*(files_of(name) for name in fatal))
    sys.path.insert(0, own_path)
    if done.threaded:
        for inherited in (descriptor, orders["lookout"]):
            os.set_inheritable(inherited, True)
        arguments = [str(descriptor), json.dumps(orders), json.dumps([*refused, *done.threaded]), *sys.argv[4:]]
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *arguments])
    problems = done.problems
    problems += [f"PRELOAD: {name} ends the interpreter when imported; left out" for name in fatal]
    problems += [
        f"PRELOAD: {name} starts a thread when imported, which a fork would lose; left out" for name in refused
    ]
    usable = not has_threads_after_fork()
    interpreter = Interpreter(
        environment=dict(os.environ),
        top_level_modules=frozenset(name.partition(".")[0] for name in sys.modules) - {"__main__", "supervisor"},
        usable=usable,
        isolated=orders["isolated"],
        memory_groups=orders["memory_groups"],
        lookout=orders["lookout"],
    )
    files = loaded_files(before) if wanted else {}
    files |= {path: (os.path.basename(path), os.stat(path).st_mtime) for path in failed_files}
    fork_hooks.stop_holding_back()
    child.prepare_warm()
    supervisor.send(WarmReady(os.getpid(), done.imported, problems, usable))
    return WarmInterpreter(supervisor, interpreter, files)


def main() -> Launch | None:
    """Returns only in a job process, with what it has to run."""
    descriptor, orders, refused = int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for inherited in (descriptor, orders["lookout"]):
        os.set_inheritable(inherited, False)
    runner = prepare(descriptor, orders, refused).run()
    return runner.run() if runner is not None else None


if __name__ == "__main__":
    job = main()
    if job is None:
        os._exit(0)
    child.run(job)
