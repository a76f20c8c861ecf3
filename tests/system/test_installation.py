"""The PyPI distribution `supervisor` (supervisord) installed over this one: its files as they are there, in a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import CHECKOUT, Answer, Commands

FOREIGN = {
    "__init__.py": "#\n",
    "states.py": "class ProcessStates:\n    STOPPED = 0\n",
    "events.py": "callbacks = []\n",
}
"""What both distributions have, and where theirs stands in the place of ours."""

Run = Callable[..., Answer]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of this package that may be damaged."""
    return shutil.copytree(CHECKOUT / "supervisor", tmp_path / "site" / "supervisor")


@pytest.fixture
def run(package: Path) -> Run:
    """Runs a command of the damaged package."""
    commands = Commands("mongodb://127.0.0.1:1/", "unused", package.parent.parent)
    commands.environment["PYTHONPATH"] = str(package.parent)
    return commands


def overwrite(package: Path) -> None:
    for name, text in FOREIGN.items():
        (package / name).write_text(text)
    metadata = package.parent / "supervisor-4.3.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: supervisor\nVersion: 4.3.0\n")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("supervisor", []),
        ("supervisor", ["status"]),
        ("supervisor", ["doctor", "--json"]),
        ("supervisor", ["--help"]),
        ("supervisor.producer", ["demo"]),
    ],
)
def test_every_command_says_that_it_was_overwritten(package: Path, run: Run, module: str, arguments: list[str]) -> None:
    overwrite(package)
    answer = run(*arguments, module=module)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith("error: files of mongo-job-supervisor were overwritten by the distribution supervisor")
    assert "4.3.0 (supervisord)" in answer.err
    assert "pip uninstall supervisor && pip install --force-reinstall mongo-job-supervisor" in answer.err


def test_the_console_scripts_say_it_too(package: Path, run: Run) -> None:
    overwrite(package)
    for entry in ("supervisor.__main__ import main", "supervisor.producer import entry as main"):
        script = package.parent.parent / "console_script.py"
        script.write_text(f"from {entry}\nmain()\n")
        answer = run("status", module="console_script")
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert "pip uninstall supervisor" in answer.err


def test_files_that_an_uninstallation_took_along_are_missed(package: Path, run: Run) -> None:
    for name in FOREIGN:
        (package / name).unlink()
    answer = run("status")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "--force-reinstall mongo-job-supervisor" in answer.err


def test_the_supervisor_does_not_start_beside_it(package: Path, run: Run) -> None:
    theirs = {name: (package / name).read_text() for name in FOREIGN}
    overwrite(package)
    for name, text in theirs.items():  # ours was installed last: whole, until the other one is updated
        (package / name).write_text(text)
    answer = run()
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "supervisor 4.3.0 (supervisord) is installed here, too: " in answer.err
    assert run("status").code == 3  # MongoDB is what is missing: nothing else is wrong
