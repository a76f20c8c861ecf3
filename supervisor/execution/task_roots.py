"""Which file a job means, and whether this supervisor may run it."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from supervisor.errors import InvalidJob

FIELD = "python_path"


def resolve_script(python_path: str, roots: Sequence[Path], cwd: str | None) -> str:
    """The script as it is given to the interpreter: as the job names it, where that leads to the same file.

    Symbolic links are followed before the file is compared with the roots. A relative path starts at the job's
    working directory, the supervisor's, or a root, whichever has the file first. Raises `InvalidJob`.
    """
    candidates = [os.path.join(base, python_path) for base in _bases(python_path, roots, cwd)]
    found = next((path for path in candidates if os.path.lexists(path)), candidates[0])
    try:
        resolved = os.path.realpath(found, strict=True)
        mode = os.stat(resolved).st_mode
    except FileNotFoundError:
        raise InvalidJob(FIELD, f"there is no file {_shown(python_path)}") from None
    except OSError as error:
        raise InvalidJob(FIELD, f"{_shown(python_path)} cannot be read: {error.strerror}") from None
    if not any(_is_below(resolved, str(root)) for root in roots):
        names = ", ".join(str(root) for root in roots)
        raise InvalidJob(FIELD, f"{_shown(python_path)} leads to {resolved}, outside the task roots ({names})")
    if stat.S_ISDIR(mode) or python_path.endswith(os.sep):
        raise InvalidJob(FIELD, f"{_shown(python_path)} is a directory, not a script")
    if not stat.S_ISREG(mode):
        raise InvalidJob(FIELD, f"{_shown(python_path)} is not a regular file")
    if not os.access(resolved, os.R_OK):
        raise InvalidJob(FIELD, f"{_shown(python_path)} cannot be read: permission denied")
    path = python_path if found is candidates[0] or os.path.isabs(python_path) else found
    return os.path.join(os.curdir, path) if path.startswith("-") else path  # no option of the interpreter


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root if root.endswith(os.sep) else root + os.sep)


def check_working_directory(cwd: str | None) -> None:
    """Raises `InvalidJob` when a job names a directory that it cannot work in."""
    if cwd is None:
        return
    if not os.path.isdir(cwd):
        raise InvalidJob("cwd", f"{_shown(cwd)} is not a directory")
    if not os.access(cwd, os.X_OK):
        raise InvalidJob("cwd", f"{_shown(cwd)} cannot be entered: permission denied")


def _bases(python_path: str, roots: Sequence[Path], cwd: str | None) -> list[str | Path]:
    if os.path.isabs(python_path):
        return [""]
    return [cwd or os.getcwd(), os.getcwd(), *roots]


def _shown(path: str) -> str:
    return repr(path) if len(path) <= 200 else repr(path[:200] + "…")
