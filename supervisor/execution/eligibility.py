"""Whether a job may run in a fork of the warm interpreter, or has to be executed to see what it should."""

from __future__ import annotations

import _imp
import os
import stat
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.execution.child import Launch

READ_AT_START = (
    "PYTHON", "LD_", "MALLOC_", "GLIBC_TUNABLES", "LC_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_", "BLIS_",
    "GOTO_", "VECLIB_", "NUMEXPR_", "NPY_", "MPL", "NUMBA_", "CUDA_",
)  # fmt: skip
"""Prefixes of the variables that the interpreter, the C library or a preloaded module reads only once."""
READ_AT_START_NAMES = frozenset({"LANG", "LOCPATH", "HOME"})  # HOME: where site looks for the user's packages
_MODULE_SUFFIXES = (".py", ".pyc", *_imp.extension_suffixes())
_LISTING_SETTLES_NS = 2_000_000_000
"""A directory changed this recently may change again without a new modification time: its listing is not kept."""
_listings: dict[str, tuple[int, frozenset[str]]] = {}


def why_not_warm(
    launch: Launch, *, base_env: Mapping[str, str], top_level_names: Collection[str], python: str
) -> str | None:
    """The reason why a fork of the warm interpreter would not do what `python script.py` does, or None.

    Sets the directory that the script was found in.
    `base_env` is the environment of the warm interpreter, `top_level_names` are the modules it has loaded, `python`
    is its executable. Source that does not compile is found out only in the child, see `run`.
    """
    if launch.start_method != "warm":
        return "it asks for a fresh interpreter"
    if launch.python != python:
        return f"it asks for another interpreter, {launch.python}"
    names = launch.env.keys() if launch.adds else launch.env.keys() | base_env.keys()
    variable = _changed_at_start(base_env, launch.env, names)
    if variable is not None:
        return f"the environment variable {variable} is read when an interpreter starts"
    try:
        resolved = os.path.realpath(launch.path, strict=True)
        if not stat.S_ISREG(os.stat(resolved).st_mode):
            return "it is not a plain file"
        launch.directory = directory = os.path.dirname(resolved)
        candidates = _first_parts(directory).intersection(top_level_names)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name in sorted(candidates):
        if _shadows(directory, name):
            return f"{name} beside the script shadows a module that is already loaded"
    return None if os.access(resolved, os.R_OK) else "the script cannot be read"


def _changed_at_start(base_env: Mapping[str, str], env: Mapping[str, str], names: Iterable[str]) -> str | None:
    for name in names:
        if (name.startswith(READ_AT_START) or name in READ_AT_START_NAMES) and env.get(name) != base_env.get(name):
            return name
    return None


def _first_parts(directory: str) -> frozenset[str]:
    """First parts of the names in a directory; kept for as long as the directory's modification time stays."""
    modified = os.stat(directory).st_mtime_ns
    known = _listings.get(directory)
    if known is not None and known[0] == modified:
        return known[1]
    names = frozenset(name.partition(".")[0] for name in os.listdir(directory))
    if time.time_ns() - modified > _LISTING_SETTLES_NS:
        if len(_listings) > 100:
            _listings.clear()
        _listings[directory] = (modified, names)
    return names


def _shadows(directory: str, name: str) -> bool:
    """Whether `import name` in a fresh interpreter would find it here; a directory without __init__ never wins."""
    if name in sys.builtin_module_names or _imp.is_frozen(name):
        return False
    places = os.path.join(directory, name), os.path.join(directory, name, "__init__")
    return any(os.path.isfile(place + suffix) for place in places for suffix in _MODULE_SUFFIXES)
