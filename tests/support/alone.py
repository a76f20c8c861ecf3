"""Runs a test in a process of its own, which has no children but those that the test starts.

The main process of a test run is the parent of databases and of what other tests have started.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import pytest
from _pytest.runner import runtestprotocol


class _Sibling:
    """Stands for the next test: what it shares with this one (databases, modules' fixtures) is not taken down here."""

    def __init__(self, item: pytest.Item) -> None:
        self._chain = item.listchain()[:-1]

    def listchain(self) -> list[Any]:
        return self._chain


def run_alone(item: pytest.Item) -> list[pytest.TestReport]:
    """The reports of the test, as if it had run here."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a driver's threads are here, and stay here
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            reports = runtestprotocol(item, log=False, nextitem=_Sibling(item))  # type: ignore[arg-type]
            with os.fdopen(writer, "w") as answer:
                json.dump([_plain(report, item) for report in reports], answer)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    if not text:
        raise AssertionError(f"{item.nodeid} ended its process")
    return [
        item.config.hook.pytest_report_from_serializable(config=item.config, data=data) for data in json.loads(text)
    ]


def _plain(report: pytest.TestReport, item: pytest.Item) -> Any:
    return item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
