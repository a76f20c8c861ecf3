"""Keeps the after-fork hooks of `threading` and `logging` from running in each job, and gives them to the jobs.

What they put right after a fork is right in a process that never had a second thread, and they cost a job a tenth of
its time. A job needs them for forks of its own, so that each one registers them for itself. To be called before either
module is imported.
"""

from __future__ import annotations

import os
from typing import Any

_HELD_BACK = ("threading", "logging")
_register = os.register_at_fork
_hooks: list[dict[str, Any]] = []


def hold_back() -> None:
    """From now on, hooks of these modules are only noted."""
    os.register_at_fork = _register_or_note


def stop_holding_back() -> None:
    os.register_at_fork = _register


def register() -> None:
    """In a job: what was noted is registered."""
    for hooks in _hooks:
        _register(**hooks)


def _register_or_note(**hooks: Any) -> None:
    if getattr(hooks.get("after_in_child"), "__module__", None) in _HELD_BACK:
        _hooks.append(hooks)
    else:
        _register(**hooks)
