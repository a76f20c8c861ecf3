"""Runs Python scripts as jobs from MongoDB, each in a process of its own and within the memory it was promised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervisor.manager import JobManager
    from supervisor.states import Status

__version__ = "1.0.0"
__all__ = ["JobManager", "Status", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: the warm interpreter imports this package, and must load neither pymongo nor pydantic.
    if name == "JobManager":
        from supervisor.manager import JobManager

        return JobManager
    if name == "Status":
        from supervisor.states import Status

        return Status
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
