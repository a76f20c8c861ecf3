"""Whether this package is whole: the PyPI distribution `supervisor` (supervisord) installs the same import package.

The two overwrite each other's `__init__`, `states` and `events`, and uninstalling one removes them for both. So every
command looks here before it imports anything else of ours. Standard library only, and nothing of this package but the
files that may be foreign.
"""

from __future__ import annotations

import sys
from importlib import import_module

EXIT_CODE = 2
_MARKS = (("supervisor", "__version__"), ("supervisor.states", "Status"))
"""A name of ours in files that may be foreign; `events` comes and goes with them, and is not loaded for this."""


def require_whole() -> None:
    """Ends the process with one line and exit code 2 where files of this package are foreign or missing."""
    if not is_whole():
        other = conflicting_distribution()
        cause = f"overwritten by the distribution {other} (supervisord)" if other else "overwritten or removed"
        print(f"error: files of mongo-job-supervisor were {cause}: {advice()}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def is_whole() -> bool:
    """Whether the files that the other distribution has, too, are ours."""
    try:
        return all(name in vars(import_module(module)) for module, name in _MARKS)
    except ImportError:
        return False


def conflicting_distribution() -> str | None:
    """Name and version of the PyPI distribution `supervisor` (supervisord), if it is installed beside this one."""
    from importlib import metadata

    try:
        return f"supervisor {metadata.version('supervisor')}"
    except metadata.PackageNotFoundError:
        return None


def advice() -> str:
    """What to do about it."""
    return (
        "use a virtual environment of its own for one of them, or: "
        "pip uninstall supervisor && pip install --force-reinstall mongo-job-supervisor"
    )
