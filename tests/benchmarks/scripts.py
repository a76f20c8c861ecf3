"""The scripts that every side runs, written into a directory for the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NO_OP = "pass\n"
PANDAS = "import numpy\nimport pandas\n"
FIRST_LINE = """\
import time; began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
import os, sys
pipe = os.open(sys.argv[1], os.O_WRONLY)
os.write(pipe, b"%d\\n" % began)
os.close(pipe)
"""


@dataclass(frozen=True, slots=True)
class Scripts:
    """Paths of the scripts."""

    no_op: Path
    pandas: Path
    first_line: Path


def write_scripts(directory: Path) -> Scripts:
    def write(name: str, source: str) -> Path:
        path = directory / name
        path.write_text(source, "utf-8")
        return path

    return Scripts(
        no_op=write("no_op.py", NO_OP),
        pandas=write("numpy_pandas.py", PANDAS),
        first_line=write("first_line.py", FIRST_LINE),
    )
