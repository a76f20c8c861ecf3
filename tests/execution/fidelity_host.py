"""A minimal warm interpreter: forks one child per request, so that the tests see what runs in a job's process.

Run as a file with the descriptor of a socket. A request is the JSON of a Launch with three descriptors; the answer is
the child's exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from supervisor.execution import fork_hooks

    fork_hooks.hold_back()

from supervisor.execution import child, fork_hooks
from supervisor.execution.child import Launch


def serve(connection: socket.socket, names: frozenset[str], environment: dict[str, str]) -> Launch | None:
    """Returns in each child with what it runs, and in the host with None when the tests are over."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return None
        launch = Launch(**json.loads(message))
        reason = None
        if launch.start_method == "warm":
            reason = child.why_not_warm(launch, base_env=environment, top_level_names=names, python=sys.executable)
        if reason is not None:
            launch = launch.executed()
        host = os.getpid()
        launch = child.before_fork(launch)
        pid = os.fork()
        if pid == 0:
            try:
                child.enter(launch, *descriptors, runner_pid=host)
                if launch.start_method == "exec":
                    child.execute(launch)
                return launch
            except OSError as error:
                os.write(2, f"start failed: {error.strerror}\n".encode())
                os._exit(127)
        child.after_fork(launch)
        for descriptor in descriptors:
            os.close(descriptor)
        _, status, usage = os.wait4(pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        answer = [os.waitstatus_to_exitcode(status), reason, seconds, usage.ru_minflt]
        connection.send(json.dumps(answer).encode())


def main() -> Launch | None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    child.keep(connection)
    own = sys.path.pop(0)
    for name in sys.argv[2].split(",") if sys.argv[2] else ():
        importlib.import_module(name)
    sys.path.insert(0, own)
    names = frozenset(name.partition(".")[0] for name in sys.modules) - {"__main__", "supervisor"}
    environment = dict(os.environ)
    fork_hooks.stop_holding_back()
    child.prepare_warm()
    return serve(connection, names, environment)


if __name__ == "__main__":
    job = main()
    if job is None:
        os._exit(0)
    child.run(job)
