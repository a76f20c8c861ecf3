"""Keeps the after-fork hooks of `threading` and `logging` from running in each job, and gives them to the jobs.

What they put right after a fork is right in a process that never had a second thread, and they cost a job a tenth of
its time. A job needs them for forks of its own: there they run once it has called `activate`. To be called before
either module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_HELD_BACK = ("threading", "logging")
_register = os.register_at_fork
_hooks: list[dict[str, Callable[[], object]]] = []
_active = False


def hold_back() -> None:
    """From now on, hooks of these modules are only noted."""
    os.register_at_fork = _register_or_note


def stop_holding_back() -> None:
    """What was noted is registered, for the jobs."""
    os.register_at_fork = _register
    for hooks in _hooks:
        _register(**{moment: _if_active(hook) for moment, hook in hooks.items()})


def activate(active: bool = True) -> None:
    """In a job: from now on, the hooks run."""
    global _active
    _active = active


def _register_or_note(**hooks: Any) -> None:
    if getattr(hooks.get("after_in_child"), "__module__", None) in _HELD_BACK:
        _hooks.append(hooks)
    else:
        _register(**hooks)


def _if_active(hook: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        if _active:
            hook()

    return run
