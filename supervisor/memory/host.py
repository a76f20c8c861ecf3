"""How much memory this host, or the container around it, has to give."""

from __future__ import annotations

from pathlib import Path

import psutil

MB = 1_048_576
DEFAULT_SHARE = 0.9
"""Headroom for the supervisor itself and for what polling cannot prevent: our limits must act before the kernel's."""


def available_mb() -> int:
    """MB that could be used now without pushing anything out: the host's, or the control group's if that is less."""
    available: int = psutil.virtual_memory().available
    group = _group_headroom()
    return (available if group is None else min(available, group)) // MB


def default_budget_mb() -> int:
    """What running jobs may reserve in all, where no setting says it."""
    return max(1, int(available_mb() * DEFAULT_SHARE))


def pressure(least_percent: float) -> str | None:
    """Why nothing more should be started, where less than this share of the host's memory is available."""
    memory = psutil.virtual_memory()
    percent = 100 * memory.available / memory.total
    if percent >= least_percent:
        return None
    return f"only {memory.available // MB} MB ({percent:.1f} %) of this host's memory are free"


def _group_headroom() -> int | None:
    """Bytes left below the tightest limit of the control groups that this process is in; None: unlimited."""
    rooms = [limit - used for limit, used in _limits() if limit < 1 << 60]
    return max(0, min(rooms)) if rooms else None


def _limits() -> list[tuple[int, int]]:
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = base / path.lstrip("/")
        while group.is_relative_to(base):
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None:
                found.append((limit, max(0, used - _cache(group))))
            group = group.parent
    return found


def _cache(group: Path) -> int:
    """The file cache in a group's usage, which the kernel takes back before it kills."""
    try:
        for line in (group / "memory.stat").read_text("ascii").splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # "max" is no number: no limit
        return None
