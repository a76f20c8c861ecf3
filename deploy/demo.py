"""The main job, end to end: a supervisor on the embedded MongoDB, the three sample jobs, and what became of them.

However this ends, the supervisor that it started is drained: by Ctrl-C, by SIGTERM, by the kernel if this is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.table import Table

from supervisor import JobManager, Status
from supervisor.cli.arguments import Parser, duration
from supervisor.cli.main import guarded
from supervisor.errors import SupervisorError
from supervisor.processes import die_with_parent
from supervisor.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 60
TERMINATED = 128 + signal.SIGTERM
COLOURS = {"pending": "yellow", "running": "cyan", "completed": "green", "failed": "red", "cancelled": "magenta"}

console = Console()


def main() -> int:
    options = Parser(prog="sh deploy/demo.sh", description=__doc__)
    options.add_argument("--stay", action="store_true", help="keep the supervisor running afterwards; Ctrl-C drains it")
    options.add_argument("--delay", type=delay, default="60s", help="until the scheduled sample job (default: 60s)")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    os.chdir(REPOSITORY)
    port = load_settings().metrics_port or 9108
    if is_taken(port):
        port = free_port()
    os.environ["SUPERVISOR_METRICS_PORT"] = str(port)
    with supervisor(port) as process:
        ids = submit(chosen.delay)
        with JobManager() as manager:
            documents = follow(manager, ids, process)
        summarize(documents, port)
        if chosen.stay:
            console.print("\nThe supervisor stays, in the foreground. Ctrl-C drains and ends it.")
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                process.wait()
    return 0


def delay(text: str) -> str:
    """A time span as the producer takes it."""
    duration(text)
    return text


def terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


@contextlib.contextmanager
def supervisor(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs until the end of the block, and is then drained as an operator would."""
    console.rule("python -m supervisor")
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor"], preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM)
    )
    try:
        wait_until_ready(process, port)
        yield process
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # further ones change nothing
        if process.poll() is None:
            console.rule("SIGTERM: drain")
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        wait_for_end(process)


def wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C goes to the supervisor, too, which then stops its jobs: it is waited for all the same."""
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(process.returncode)
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        time.sleep(0.1)
    raise SupervisorError(f"the supervisor was not ready after {START_SECONDS} s")


def submit(delay: str) -> list[str]:
    console.rule(f"python -m supervisor.producer demo --delay {delay}")
    command = [sys.executable, "-m", "supervisor.producer", "demo", "--json", "--delay", delay]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode != 0:
        sys.exit(answer.returncode)  # it has said why
    return [json.loads(line)["id"] for line in answer.stdout.splitlines()]


def follow(manager: JobManager, ids: list[str], process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """Shows the jobs until all have ended."""
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            documents = [manager.get_job(job_id) for job_id in ids]
            live.update(table(documents))
            if all(Status(document["status"]).is_final for document in documents):
                return documents
            if process.poll() is not None:
                raise SupervisorError("the supervisor has ended before the jobs")
            time.sleep(0.25)


def table(documents: list[dict[str, Any]]) -> Table:
    rows = Table(title="Sample jobs", box=None, padding=(0, 1, 0, 0))
    for heading in ("id", "name", "status", "s", "memory"):
        rows.add_column(heading, no_wrap=True)
    rows.add_column("outcome")
    for document in documents:
        status = document["status"]
        peak = document.get("peak_memory")
        rows.add_row(
            str(document["_id"]),
            document["request_name"],
            f"[{COLOURS.get(status, 'white')}]{status}[/]",
            f"{document['duration_seconds']:.1f}" if "duration_seconds" in document else "",
            f"{'-' if peak is None else peak}/{document['required_memory']} MB",
            document.get("error") or when(document),
        )
    return rows


def when(document: dict[str, Any]) -> str:
    if document["status"] == Status.PENDING:
        return f"due {document['scheduled_date']:%H:%M:%S} UTC"
    return ""


def summarize(documents: list[dict[str, Any]], port: int) -> None:
    console.print(table(documents))
    completed = sum(document["status"] == Status.COMPLETED for document in documents)
    console.print(f"{completed} of {len(documents)} completed (the sample task fails one time in five, on purpose).\n")
    console.print(f"The same story in [bold]http://127.0.0.1:{port}/metrics[/]:")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(("supervisor_jobs_claimed", "supervisor_jobs_finished")) and not line.endswith(" 0.0"):
                console.print(f"  {line}", highlight=False, markup=False)
    console.print("\nWhere to look next (in this directory, with .venv/bin/python):")
    for command in (
        "supervisor jobs list",
        f"supervisor jobs show {documents[0]['_id']}",
        f"supervisor jobs logs {documents[0]['_id']}",
        "supervisor.producer submit --wait --memory 64 tasks/memory_hog.py",
        "supervisor doctor",
    ):
        console.print(f"  python -m {command}", highlight=False)


def is_taken(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(guarded(main))
