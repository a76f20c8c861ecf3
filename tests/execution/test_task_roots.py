"""Which file a job means, and whether it may be run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.errors import InvalidJob
from supervisor.execution.task_roots import check_working_directory, resolve_script


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A task root with a script, beside a directory that is none."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.py").touch()
    (root / "sub" / "b.py").touch()
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "c.py").touch()
    return root


def refused(path: str, *roots: Path, cwd: Path | None = None) -> str:
    with pytest.raises(InvalidJob) as caught:
        resolve_script(path, roots, str(cwd) if cwd else None)
    assert caught.value.field == "python_path"
    return str(caught.value)


def test_an_absolute_path_stays_as_it_was_named(root: Path) -> None:
    for path in (f"{root}/a.py", f"{root}/sub/../a.py", f"{root}/./a.py"):
        assert resolve_script(path, [root], None) == path


def test_a_relative_path_starts_at_the_working_directory_then_at_the_roots(root: Path) -> None:
    assert resolve_script("b.py", [root], str(root / "sub")) == "b.py"
    assert Path(resolve_script("sub/b.py", [root], None)) == root / "sub" / "b.py"
    assert "no file" in refused("c.py", root)


def test_a_name_that_begins_with_a_dash_is_no_option(root: Path) -> None:
    (root / "-c.py").touch()
    assert resolve_script("-c.py", [root], str(root)) == "./-c.py"


def test_a_file_with_a_slash_behind_it_is_no_script(root: Path) -> None:
    assert "is a directory" in refused(f"{root}/a.py/", root)


def test_links_are_followed_before_the_file_is_judged(root: Path, tmp_path: Path) -> None:
    (root / "in.py").symlink_to("sub/b.py")
    (root / "out.py").symlink_to(tmp_path / "root-2" / "c.py")
    (root / "out").symlink_to(tmp_path / "root-2")
    (root / "loop.py").symlink_to("loop.py")
    (root / "broken.py").symlink_to("nowhere.py")
    assert resolve_script(f"{root}/in.py", [root], None) == f"{root}/in.py"
    assert "outside the task roots" in refused(f"{root}/out.py", root)
    assert "outside the task roots" in refused(f"{root}/out/c.py", root)
    assert "link" in refused(f"{root}/loop.py", root)
    assert "no file" in refused(f"{root}/broken.py", root)


def test_a_name_that_begins_like_a_root_is_outside(root: Path, tmp_path: Path) -> None:
    assert "outside the task roots" in refused(f"{tmp_path}/root-2/c.py", root)
    assert resolve_script(f"{tmp_path}/root-2/c.py", [root, tmp_path / "root-2"], None)


def test_a_root_that_is_itself_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert resolve_script(f"{tmp_path}/alias/a.py", [root], None) == f"{tmp_path}/alias/a.py"


def test_what_is_no_file(root: Path) -> None:
    os.mkfifo(root / "fifo")
    assert "directory" in refused(f"{root}/sub", root)
    assert "regular" in refused(f"{root}/fifo", root)
    assert refused(f"{root}/a.py/b.py", root)
    assert refused("x" * 5000, root)
    assert len(refused(f"{root}/{'x' * 100_000}", root)) < 1000


def test_working_directories(root: Path) -> None:
    check_working_directory(None)
    check_working_directory(str(root))
    for wrong in (f"{root}/a.py", f"{root}/missing", "x" * 5000):
        with pytest.raises(InvalidJob) as caught:
            check_working_directory(wrong)
        assert caught.value.field == "cwd"


@pytest.fixture
def public_root() -> Iterator[Path]:
    """A root that other users can enter: tmp_path is private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory).resolve()


def as_nobody(path: str, root: Path) -> str:
    """What is said to a user who is not root, to whom every file is readable."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(writer, resolve_script(path, [root], None).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


def test_what_cannot_be_read(public_root: Path) -> None:
    readable, unreadable, closed = public_root / "a.py", public_root / "b.py", public_root / "closed"
    readable.touch(0o644)
    unreadable.touch(0o000)
    closed.mkdir()
    (closed / "c.py").touch()
    closed.chmod(0o000)
    assert as_nobody(str(readable), public_root) == str(readable)
    for path in (unreadable, closed / "c.py"):
        assert as_nobody(str(path), public_root).startswith("InvalidJob python_path: ")
    closed.chmod(0o700)
