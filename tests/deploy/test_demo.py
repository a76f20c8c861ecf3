"""The demo as a process: however it ends, its supervisor is drained, and nobody sees a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from supervisor import JobManager
from tests.support.running import REPOSITORY, free_port, kill_at_once, wait_gone
from tests.support.waiting import wait_until

DEMO = REPOSITORY / "deploy" / "demo.py"
Demo = tuple["subprocess.Popen[bytes]", list[psutil.Process]]


def environment(**settings: object) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SUPERVISOR_")}
    return clean | {f"SUPERVISOR_{name.upper()}": str(value) for name, value in settings.items()}


@pytest.fixture
def demo(tmp_path: Path, manager: JobManager, mongo_uri: str, db_name: str) -> Iterator[Demo]:
    """A demo whose jobs are inserted, in a session of its own, and all processes that it has started."""
    settings = environment(
        mongo_uri=mongo_uri, mongo_db=db_name, data_dir=tmp_path, metrics_port=free_port(), workers=1,
        shutdown_timeout=1, kill_grace=1,
    )  # fmt: skip
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(DEMO), "--delay", "1h"], env=settings, stdout=said, stderr=said, start_new_session=True
        )
    started: list[psutil.Process] = []
    try:
        wait_until(lambda: manager.jobs.collection.count_documents({}) == 3, timeout=60)
        children = psutil.Process(process.pid).children
        wait_until(lambda: len(children()) == 1, timeout=60, what="the end of the producer")
        started = children(recursive=True)
        yield process, started
    finally:
        process.kill()
        process.wait()
        kill_at_once(started)


def said(directory: Path) -> str:
    return (directory / "said").read_text()


def test_sigterm_drains_its_supervisor(demo: Demo, tmp_path: Path) -> None:
    process, started = demo
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "SIGTERM: drain" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    wait_gone(started)


def test_ctrl_c_drains_its_supervisor(demo: Demo, tmp_path: Path) -> None:
    process, started = demo
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in said(tmp_path)
    wait_gone(started)


def test_its_supervisor_does_not_outlive_it(demo: Demo, tmp_path: Path) -> None:
    process, started = demo
    process.kill()
    wait_gone(started, within=30)
    assert "Traceback" not in said(tmp_path)


@pytest.mark.parametrize(("arguments", "words"), [(["--delay", "abc"], "--delay: 'abc'"), (["--stya"], "--stya")])
def test_wrong_usage_is_one_line(arguments: list[str], words: str) -> None:
    answer = subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith("error: ") and words in answer.stderr
