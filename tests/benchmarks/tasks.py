"""The function that RQ and Celery run for a job: a script, in the process that they run functions in."""

from __future__ import annotations

import runpy
import sys


def run_script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
