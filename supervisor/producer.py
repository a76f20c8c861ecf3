"""`python -m supervisor.producer`: inserts jobs, one, three or a hundred thousand.

Everything is checked before it is sent. When MongoDB goes away in the middle of an import, what was inserted stays,
the command ends with exit code 3 and says how far it came.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from supervisor.installation import require_whole

require_whole()  # before anything is imported that may not be there

from supervisor.cli.arguments import Parser, add_json, duration, some_text, unicode_text, utc_time, variable, whole
from supervisor.cli.main import answered, complain, connected, guarded, leave
from supervisor.errors import InvalidJob, StoreUnavailable, SupervisorError, UsageError
from supervisor.states import Status

if TYPE_CHECKING:
    from supervisor.cli.batch import Record
    from supervisor.manager import Document, JobManager

BATCH = 1000
SHOWN_OUTPUT_LINES = 20
DEMO_SCRIPT = "sample_task.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return guarded(lambda: _run(parser().parse_args(argv)))


def entry() -> NoReturn:
    """The console command of this name."""
    leave(main())


def _run(options: argparse.Namespace) -> int:
    return answered(lambda: int(options.command(options)), as_json=options.json)


# -- demo -------------------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> int:
    """Three sample jobs: immediate, scheduled in one minute, one that may fail."""
    script = str(demo_script())
    later = _in_a_while(options.delay, "--delay")
    seconds = [] if options.seconds is None else ["--seconds", f"{options.seconds:g}"]
    surely = ["--fail-rate", "0", *seconds]
    samples: list[tuple[str, list[str], dict[str, Any]]] = [
        ("immediate sample", ["hello", *surely], {}),
        ("scheduled sample", ["later", *surely], {"scheduled_date": later}),
        ("sample that may fail", ["perhaps", *seconds], {}),
    ]
    with connected() as manager:
        for name, arguments, fields in samples:
            job_id = manager.create_job(name, script, arguments, **fields, tags=["demo"])
            _say_created(job_id, name, options.json)
    return 0


def demo_script() -> Path:
    """The sample task: in the working directory's `tasks`, else in the one beside this package."""
    places = [
        Path.cwd() / "tasks" / DEMO_SCRIPT,
        Path(__file__).resolve().parent.parent / "tasks" / DEMO_SCRIPT,
    ]
    for place in places:
        if place.is_file():
            return place
    raise SupervisorError(
        f"there is no tasks/{DEMO_SCRIPT} in {Path.cwd()}: run the demo in a checkout of the repository, which has it, "
        "or submit a script of your own: python -m supervisor.producer submit SCRIPT"
    )


def _say_created(job_id: str, name: str, as_json: bool) -> None:
    from supervisor.cli import render

    if as_json:
        render.print_json({"id": job_id, "request_name": name, "status": Status.PENDING})
    else:
        print(job_id, flush=True)
        if render.on_terminal(sys.stderr):
            complain(
                f"inserted {render.printable(name)}; look at it with: python -m supervisor jobs show {job_id}",
                word="note",
            )


# -- submit -----------------------------------------------------------------------------------------------------------


def submit(options: argparse.Namespace) -> int:
    """Inserts one job; with --wait 0 only if it completed."""
    from supervisor.cli import render

    script, arguments = _script_and_arguments(options.words)
    if not os.path.isfile(script):
        complain(f"there is no file {script} on this host", word="warning")
    with connected() as manager:
        memory_mb, source = _memory(manager, script, options.memory)
        fields = _fields(options, script, arguments, memory_mb)
        job_id = manager.create_job(**fields)
        if options.json:
            created = {"id": job_id, "request_name": fields["request_name"], "status": Status.PENDING}
            render.print_json({**created, "required_memory": memory_mb, "required_memory_source": source})
        else:
            if options.memory == "auto":
                complain(f"required_memory: {memory_mb} MB ({source})", word="note")
            _say_created(job_id, fields["request_name"], False)
        return _await_end(manager, job_id, options.json) if options.wait else 0


def _memory(manager: JobManager, script: str, wanted: int | str | None) -> tuple[int, str]:
    """MB to reserve, and where the number comes from."""
    from supervisor.job import DEFAULT_MEMORY_MB

    if isinstance(wanted, int):
        return wanted, "given"
    if wanted != "auto":
        return DEFAULT_MEMORY_MB, "default"
    known = manager.reports.memory_by_script(script=script)
    if not known:
        return DEFAULT_MEMORY_MB, "default: no finished run of this script has a measured peak"
    if known[0].recommended is None:
        return DEFAULT_MEMORY_MB, f"default: {known[0].reason}"
    return known[0].recommended, known[0].reason


def _script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The absolute path of the script, and its arguments untouched: argparse would take a first `--` from them."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words or not words[0]:
        raise UsageError(
            "the following arguments are required: SCRIPT (see: python -m supervisor.producer submit --help)"
        )
    try:
        return unicode_text(os.path.abspath(words[0])), words[1:]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"argument SCRIPT: {error}") from None


def _fields(options: argparse.Namespace, script: str, arguments: list[str], memory_mb: int) -> dict[str, Any]:
    chosen = {
        "queue": options.queue,
        "priority": options.priority,
        "timeout": options.timeout,
        "max_attempts": options.max_attempts,
        "retry_delay": options.retry_delay,
        "unique_key": options.unique_key,
        "env": dict(options.env) or None,
        "cwd": os.path.abspath(options.cwd) if options.cwd is not None else None,
        "start_method": options.start_method,
        "tags": options.tag or None,
        "memory_warning": options.memory_warning or None,
        "memory_growth": options.memory_growth,
        "max_memory": options.max_memory,
    }
    return {
        "request_name": options.name if options.name is not None else os.path.basename(script),
        "python_path": script,
        "python_args": arguments,
        "required_memory": memory_mb,
        "scheduled_date": _scheduled(options),
        **{name: value for name, value in chosen.items() if value is not None},
    }


def _scheduled(options: argparse.Namespace) -> datetime | None:
    if options.delay is None:
        at: datetime | None = options.at
        return at
    return _in_a_while(options.delay, "--in")


def _in_a_while(seconds: float, option: str) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        raise UsageError(f"argument {option}: is too far in the future") from None


def _await_end(manager: JobManager, job_id: str, as_json: bool) -> int:
    from supervisor.cli import render
    from supervisor.cli.jobs import took, wait_until_ended
    from supervisor.cli.logs import Printer, last_lines

    keys = manager.reports.keys([job_id])
    job = wait_until_ended(manager, keys, None)[job_id]
    if as_json:
        render.print_json(render.plain_job(job))
    else:
        attempt = max(1, int(job.get("attempts") or 0))
        chunks = manager.output.read(keys[job_id], attempt)
        Printer(as_json=False, stream=None, whole=False).write_all(attempt, last_lines(chunks, SHOWN_OUTPUT_LINES))
        error = f": {job['error']}" if job.get("error") else f" after {took(job)}"
        status = str(job.get("status"))
        render.line(render.printable(f"{status}{error}"), render.STATUS_STYLES.get(status, ""))
    return 0 if job.get("status") == Status.COMPLETED else 1


# -- import -----------------------------------------------------------------------------------------------------------


def import_jobs(options: argparse.Namespace) -> int:
    """Inserts the jobs that a file describes; 1 if a line was refused."""
    from supervisor.cli import render
    from supervisor.cli.batch import format_of, opened, records, size_of

    kind = format_of(options.file, options.format)
    name = "stdin" if options.file == "-" else options.file
    totals = _Totals(name, options.json)
    with opened(options.file, twice=options.strict) as file:
        total = size_of(file)
        if options.strict:
            with render.progress("checking", total, "bytes") as advance:
                for record in records(file, kind, advance):
                    totals.check(record)
            if totals.refused:
                return totals.end(strict=True)
            file.seek(0)
            totals = _Totals(name, options.json)
        with connected() as manager, render.progress("importing", total, "bytes") as advance:
            for record in records(file, kind, advance):
                document = totals.check(record)
                if document is not None:
                    totals.add(manager, record.line, document)
            totals.send(manager)
    return totals.end()


class _Totals:
    """Sends checked documents in batches, names the lines that are refused, and counts both."""

    def __init__(self, name: str, as_json: bool) -> None:
        self.inserted = 0
        self.refused = 0
        self._name = name
        self._as_json = as_json
        self._errors: list[dict[str, Any]] = []
        self._batch: list[tuple[int, Document]] = []

    def check(self, record: Record) -> Document | None:
        """The document of a line, or None when it was refused."""
        from supervisor.manager import new_document

        error = record.error
        if error is None:
            try:
                created_at = record.fields.pop("created_at", None)
                document = new_document(**record.fields)
                return document if created_at is None else {**document, "created_at": created_at}
            except InvalidJob as invalid:
                error = invalid
            except TypeError:
                error = InvalidJob("document", "names a field that cannot be one")
        self._refuse(record.line, error)
        return None

    def add(self, manager: JobManager, line: int, document: Document) -> None:
        self._batch.append((line, document))
        if len(self._batch) >= BATCH:
            self.send(manager)

    def send(self, manager: JobManager) -> None:
        """Inserts what waits in the batch."""
        batch, self._batch = self._batch, []
        try:
            taken = manager.create_jobs([document for _, document in batch])
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{error} ({self.inserted:,} jobs were inserted before; of the next "
                                   f"{len(batch):,}, from line {batch[0][0]}, some may be)") from error  # fmt: skip
        for refusal in taken:
            same = [
                (line, document) for line, document in batch
                if document.get("unique_key") == refusal.unique_key and str(document.get("_id")) != refusal.job_id
            ]  # fmt: skip
            line, document = same[-1]
            batch.remove((line, document))
            self._refuse(line, refusal)
        self.inserted += len(batch)

    def _refuse(self, line: int, error: SupervisorError) -> None:
        self.refused += 1
        if self._as_json:
            self._errors.append({"line": line, "error": str(error)})
        print(f"{self._name}:{line}: {' '.join(str(error).split())}", file=sys.stderr)

    def end(self, *, strict: bool = False) -> int:
        """Says what came of it; returns the exit code."""
        from supervisor.cli import render

        if self._as_json:
            render.print_json({"inserted": self.inserted, "refused": self.refused, "errors": self._errors})
        else:
            nothing = ": nothing was inserted (--strict)" if strict else ""
            print(f"{render.counted(self.inserted, 'job')} inserted, {self.refused:,} refused{nothing}")
        return 1 if self.refused else 0


# -- the parser -------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """Every command with its options."""
    top = Parser(prog="python -m supervisor.producer", description="Inserts jobs. All times are UTC.")
    top.set_defaults(json=False)
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser, required=True, dest="name_of_command")
    shown = commands.add_parser("demo", help="three sample jobs: immediate, scheduled in one minute, one that may fail")
    add_json(shown, "one JSON document per line, one for each job")
    shown.add_argument(
        "--delay", type=duration, default=60.0, metavar="TIME", help="of the scheduled one (default 60s)"
    )
    shown.add_argument("--seconds", type=float, metavar="S", help="how long each job works (default: 3 to 8)")
    shown.set_defaults(command=demo)
    _add_submit(commands.add_parser("submit", help="one job", usage=f"{top.prog} submit [options] SCRIPT [ARGS...]"))
    many = commands.add_parser("import", help="many jobs, from JSON Lines or CSV")
    add_json(many, "one JSON document, the summary")
    many.add_argument("file", metavar="FILE|-", help="one job per line, its fields as in the document; - is stdin")
    many.add_argument("--format", choices=["jsonl", "csv"], help="default: by the file's name; stdin is jsonl")
    many.add_argument("--strict", action="store_true", help="insert nothing if any line is wrong")
    many.set_defaults(command=import_jobs)
    return top


def _memory_option(text: str) -> int | str:
    return text if text == "auto" else whole(text)


def _add_submit(one: argparse.ArgumentParser) -> None:
    one.description = "Inserts one job and prints its id. What follows SCRIPT is passed on as it is."
    add: Callable[..., Any] = one.add_argument
    add_json(one, "one JSON document; with --wait a second one at the end, on a line of its own")
    add("--name", type=some_text, help="of the request (default: the script's base name)")
    add("--memory", type=_memory_option, metavar="MB|auto", help="reserved, and the limit (default 128); "
        "auto: what earlier runs of the script recommend")  # fmt: skip
    time = one.add_mutually_exclusive_group()
    time.add_argument("--at", type=utc_time, metavar="TIME", help="not before this ISO 8601 time; without zone: UTC")
    time.add_argument("--in", type=duration, dest="delay", metavar="TIME", help="not before: 90s, 5m, 2h, or seconds")
    add("--queue", type=some_text, help="default: default")
    add("--priority", type=int, metavar="N", help="higher runs first (default 0)")
    add("--timeout", type=duration, metavar="TIME", help="wall-clock limit of one attempt")
    add("--max-attempts", type=whole, metavar="N", help="attempts that may fail (default 1)")
    add("--retry-delay", type=duration, metavar="TIME", help="before the first retry; doubles (default 5s)")
    add("--unique-key", type=some_text, metavar="KEY", help="at most one pending or running job per key")
    add("--env", type=variable, action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    add("--cwd", metavar="DIR", help="working directory (default: the supervisor's)")
    add("--tag", type=some_text, action="append", default=[], metavar="TAG", help="may be repeated")
    add("--start-method", choices=["warm", "exec"], help="default: the supervisor's setting")
    add("--memory-warning", action="store_true", help="send SIGUSR1 once at 90 %% of the limit; "
        "ends a script that has no handler for it")  # fmt: skip
    add(
        "--memory-growth",
        type=float,
        metavar="FACTOR",
        help="after a kill for memory: again with so many times as much; needs --max-memory",
    )
    add("--max-memory", type=whole, metavar="MB", help="up to this much, at least --memory")
    add(
        "--wait",
        action="store_true",
        help="until it has ended, and show its last output; exit code 0 = completed",
    )
    add(
        "words",
        metavar="SCRIPT [ARGS...]",
        nargs=argparse.REMAINDER,
        help="the job; -- before it ends the options",
    )
    one.set_defaults(command=submit)


if __name__ == "__main__":
    entry()
