"""Runs the benchmarks and writes the report.

    python -m tests.benchmarks [--quick] [--only NAME,NAME] [--results DIRECTORY]

Needs the extras `embedded` and `benchmark`, and redis-server. `run.sh` beside this file sets all of it up.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import claim_cost, idle, latency, memory_kill, packing, report, throughput
from tests.benchmarks.results import Section
from tests.benchmarks.scale import Scale

BENCHMARKS: dict[str, Callable[[Scale], Section]] = {
    "throughput": throughput.measure,
    "latency": latency.measure,
    "idle": idle.measure,
    "claim_cost": claim_cost.measure,
    "memory_kill": memory_kill.measure,
    "packing": packing.measure,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything works")
    parser.add_argument("--only", default="", help="comma-separated: " + ", ".join(BENCHMARKS))
    parser.add_argument("--results", type=Path, help="directory for the report; default: beside the benchmarks")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(BENCHMARKS)
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that everything is ended and removed
    results: Path = arguments.results or (Path(tempfile.mkdtemp(prefix="benchmark-")) if arguments.quick else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as scratch:
            section = BENCHMARKS[name](Scale(arguments.quick, Path(scratch), results))
        report.save(results, name, section, quick=arguments.quick)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    path = report.write(results, list(BENCHMARKS))
    print(path.read_text("utf-8"))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
