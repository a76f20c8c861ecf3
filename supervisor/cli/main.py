"""`python -m supervisor`: which command is meant, and how each one ends.

Every command ends here: an error is one line on stderr, never a traceback (with `python -X dev` it is shown), and
the exit code is 0 = success, 1 = it did not succeed, 2 = wrong usage or configuration, 3 = MongoDB cannot be
reached, 130 = interrupted. Modules of commands are imported by name when their command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from supervisor.cli.arguments import Parser, add_filters, add_json, duration, unicode_text, whole
from supervisor.errors import SupervisorError

if TYPE_CHECKING:
    from supervisor.manager import JobManager

INTERRUPTED = 130
SELECTION_TIMEOUT_SECONDS = 5.0

_LINES = "one JSON document per line"
_ONE = "one JSON document"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return guarded(lambda: _run(parser().parse_args(argv)))


def guarded(command: Callable[[], int]) -> int:
    """Runs a command and turns whatever it raises into one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of jobs on a terminal that is not UTF-8
    try:
        code = command()
        if sys.stdout is not None:  # it is when the caller closed it
            sys.stdout.flush()
        return code
    except SupervisorError as error:
        complain(str(error))
        return error.exit_code
    except SystemExit as leaving:  # argparse, after --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        complain(f"{type(error).__name__}: {error}")
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process of a command.

    At exit the driver joins its threads, which sleep for half a second each, although nothing is left to be sent:
    a short command does not wait for them. Nothing here relies on exit handlers; output is flushed.
    """
    if "pymongo" not in sys.modules:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(code)


def complain(message: str, *, word: str = "error") -> None:
    """One line on stderr."""
    shown = " ".join(message.split()) if "\n" in message else message
    print(f"{word}: {shown}", file=sys.stderr, flush=True)


def connected(**overrides: Any) -> JobManager:
    """The jobs, as the settings say; nothing is sent yet."""
    from supervisor.manager import JobManager
    from supervisor.settings import load_settings

    return JobManager(settings=load_settings(**overrides), selection_timeout_seconds=SELECTION_TIMEOUT_SECONDS)


def _run(chosen: argparse.Namespace) -> int:
    module, _, name = chosen.command.partition(":")
    command = getattr(importlib.import_module(f"supervisor.cli.{module}"), name)
    if module == "run":
        from supervisor.settings import load_settings

        return int(command(load_settings(**({"log_format": "json"} if chosen.json else {}))))
    if module == "doctor":
        return int(command(chosen))

    def ask() -> int:
        with connected() as manager:
            return int(command(manager, chosen))

    return answered(ask, as_json=chosen.json)


def answered(command: Callable[[], int], *, as_json: bool) -> int:
    """Runs a command that has an answer: with --json an error is one, too, beside the line on stderr."""
    try:
        return command()
    except SupervisorError as error:
        if as_json:
            from supervisor.cli.render import print_json

            print_json({"error": str(error)})
        raise


# -- the parser -------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """Every command with its options. `command` in the result is `module:function` of `supervisor.cli`."""
    from supervisor import __version__

    top = Parser(
        prog="python -m supervisor",
        description="Runs Python scripts as jobs from MongoDB, within the memory they were promised. "
        "Without a command: run the supervisor. Settings: environment variables SUPERVISOR_*, or settings.env. "
        "Exit codes: 0 success, 1 no success, 2 wrong usage or configuration, 3 MongoDB cannot be reached.",
        epilog="Jobs are inserted with python -m supervisor.producer.",
    )
    top.add_argument("--version", action="version", version=f"mongo-job-supervisor {__version__}")
    add_json(top, "the log, or the command's answer")
    top.set_defaults(command="run:run", json=False)
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    run = commands.add_parser("run", help="the supervisor, in the foreground")
    add_json(run, "the log as one JSON document per line")
    run.set_defaults(command="run:run")
    _add_jobs(commands.add_parser("jobs", help="look at jobs, cancel, retry and wait for them"))
    status = commands.add_parser("status", help="supervisors, workers, queues, memory budget, at a glance")
    add_json(status, _ONE)
    status.set_defaults(command="status:status")
    doctor = commands.add_parser("doctor", help="checks configuration, MongoDB, indexes, stuck jobs; says what to do")
    add_json(doctor, _ONE)
    doctor.set_defaults(command="doctor:doctor")
    return top


def _add_jobs(jobs: argparse.ArgumentParser) -> None:
    actions = jobs.add_subparsers(metavar="ACTION", parser_class=Parser, required=True, dest="action")

    def add(name: str, command: str, meaning: str, machine: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=meaning, description=meaning[:1].upper() + meaning[1:] + ".")
        action.set_defaults(command=command)
        add_json(action, machine)
        return action

    found = add("list", "jobs:list_jobs", "jobs, newest first", _LINES)
    add_filters(found)
    found.add_argument("--limit", type=whole, default=50, metavar="N", help="at most this many (default 50)")

    show = add("show", "jobs:show", "everything about one job, with its log", _ONE)
    show.add_argument("id", type=unicode_text, metavar="ID")

    explain = add("explain", "jobs:explain_job", "one sentence: why a job does not run, or ended as it did", _ONE)
    explain.add_argument("id", type=unicode_text, metavar="ID")

    logs = add(
        "logs",
        "logs:logs",
        "what a job printed, byte for byte; stderr goes to stdout, too",
        f"{_LINES} and piece",
    )
    logs.add_argument("id", type=unicode_text, metavar="ID")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    logs.add_argument("--attempt", type=whole, metavar="N", help="of this attempt (default: the last one)")
    logs.add_argument("--stream", choices=["stdout", "stderr"], help="only this stream")
    logs.add_argument("--tail", type=whole, metavar="N", help="only the last N lines of what is there")

    cancel = add("cancel", "jobs:cancel", "cancel pending jobs and stop running ones", _LINES)
    cancel.add_argument("ids", type=unicode_text, metavar="ID", nargs="+")
    cancel.add_argument("--wait", action="store_true", help="until the running ones have ended")

    retry = add("retry", "jobs:retry", "let finished jobs run again, now", _LINES)
    retry.add_argument("ids", type=unicode_text, metavar="ID", nargs="*")
    retry.add_argument("--all", action="store_true", help="all finished jobs that the filters choose (default: failed)")
    retry.add_argument("--yes", action="store_true", help="with --all: do not ask")
    add_filters(retry)

    wait = add("wait", "jobs:wait", "wait until jobs have ended; exit code 0 only if all completed", _LINES)
    wait.add_argument("ids", type=unicode_text, metavar="ID", nargs="+")
    wait.add_argument("--timeout", type=duration, metavar="TIME", help="give up after this long (90s, 5m, 2h)")

    memory = add("memory", "memory:memory", "declared and used memory per script, and what to declare", _LINES)
    memory.add_argument("--script", type=unicode_text, metavar="TEXT", help="whose script's path contains this text")
    memory.add_argument("--limit", type=whole, default=50, metavar="N", help="at most this many (default 50)")


__all__ = ["answered", "complain", "connected", "guarded", "leave", "main"]
