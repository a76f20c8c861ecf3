"""One look for all plots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

OURS = "#1b6ca8"
OTHERS = "#9aa5ae"
LIMIT = "#c0392b"
COLOURS = [OURS, "#e08e0b", "#4c9f70", "#8e5ea2", LIMIT, OTHERS, "#6d4c41"]


@contextlib.contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 3.6) -> Iterator[Any]:
    """Axes to draw on (an array where there are several), saved as a small PNG at the end."""
    drawn, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    for axis in drawn.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(drawn)


def colour_of(name: str) -> str:
    return OURS if name.startswith("supervisor") else OTHERS
