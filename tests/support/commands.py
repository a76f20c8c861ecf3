"""The commands as people run them: processes with the settings of one test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Its standard output as one JSON document per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> dict[str, Any]:
        """Its standard output as one JSON document."""
        (only,) = self.documents
        return only


class Commands:
    """Runs commands against one database."""

    def __init__(self, uri: str, db_name: str, directory: Path) -> None:
        self.directory = directory
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SUPERVISOR_")}
        self.environment = {
            **kept,
            "SUPERVISOR_MONGO_URI": uri,
            "SUPERVISOR_MONGO_DB": db_name,
            "SUPERVISOR_METRICS_PORT": "0",
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONIOENCODING": "utf-8",
        }

    def start(self, *arguments: str, module: str = "supervisor", **options: Any) -> subprocess.Popen[bytes]:
        """A command that is not waited for."""
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        }
        environment = self.environment | options.pop("environment", {})
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=self.directory, env=environment, **options
        )

    def __call__(
        self,
        *arguments: str,
        module: str = "supervisor",
        stdin: bytes = b"",
        environment: dict[str, str] | None = None,
    ) -> Answer:
        """Runs a command to its end."""
        process = self.start(*arguments, module=module, stdin=subprocess.PIPE, environment=environment or {})
        try:
            out, err = process.communicate(stdin, SECONDS)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        assert b"Traceback" not in err, err.decode()
        return Answer(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    def producer(self, *arguments: str, **options: Any) -> Answer:
        return self(*arguments, module="supervisor.producer", **options)
