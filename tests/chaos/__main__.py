"""`python -m tests.chaos --seed 7 --jobs 2000`: runs it, prints the verdict, exits with 0 or 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.chaos.nemesis import WEIGHTS
from tests.chaos.planted import BUGS
from tests.chaos.run import Options, Result, run
from tests.chaos.workload import KINDS


def main() -> int:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[default.seed], help="one run for each")
    parser.add_argument("--jobs", type=int, default=default.jobs)
    parser.add_argument("--supervisors", type=int, default=default.supervisors)
    parser.add_argument("--seconds", type=float, default=default.seconds, help="how long faults are done")
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--lease-seconds", type=float, default=default.lease_seconds)
    parser.add_argument("--faults-per-second", type=float, default=default.faults_per_second)
    parser.add_argument("--faults", default=",".join(WEIGHTS), help="comma-separated; empty = none")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated kinds of jobs")
    parser.add_argument("--bug", choices=sorted(BUGS), help="break the supervisor, to see the checker find it")
    parser.add_argument("--keep", type=Path, default=Path("chaos-history"), help="where a bad run's history goes")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    faults = tuple(name for name in arguments.faults.split(",") if name)
    kinds = tuple(arguments.kinds.split(","))
    unknown = {*faults} - {*WEIGHTS} | {*kinds} - {*KINDS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    succeeded = True
    for seed in arguments.seed:
        options = Options(
            seed=seed,
            jobs=arguments.jobs,
            supervisors=arguments.supervisors,
            seconds=arguments.seconds,
            workers=arguments.workers,
            lease_seconds=arguments.lease_seconds,
            faults_per_second=arguments.faults_per_second,
            faults=faults,
            kinds=kinds,
            bug=arguments.bug,
            keep=arguments.keep / f"seed-{seed}",
        )
        result = run(options, say=lambda line: None if arguments.quiet else print(line, flush=True))
        report(options, result)
        succeeded = succeeded and result.succeeded
    return 0 if succeeded else 1


def report(options: Options, result: Result) -> None:
    """The verdict, with what was done and how often everything was checked."""
    print(f"seed {options.seed}: {options.jobs} jobs, {options.supervisors} supervisors, {result.seconds:.0f} s")
    records = result.history.records.values()
    begun = sum(record.event == "begin" for attempt in records for record in attempt)
    print(f"  attempts begun: {begun}, records: {sum(map(len, records))}")
    print("  jobs: " + ", ".join(f"{status} {count}" for status, count in sorted(result.statuses.items())))
    print(f"  faults: {result.faults.total()}: " + ", ".join(f"{n} {c}" for n, c in sorted(result.faults.items())))
    for name, reason in sorted(result.left_out.items()):
        print(f"  left out: {name}: {reason}")
    broken = {violation.invariant for violation in result.verdict.violations}
    for invariant, count in sorted(result.verdict.checked.items()):
        print(f"  {'BROKEN' if invariant in broken else 'holds ':6} {invariant} ({count} checks)")
    for violation in result.verdict.violations[:40]:
        print(f"    {violation}")
    if len(result.verdict.violations) > 40:
        print(f"    and {len(result.verdict.violations) - 40} more")
    print(f"  verdict: {'everything holds' if result.succeeded else 'BROKEN'}", flush=True)
    if not result.succeeded:
        print(f"  history: {options.keep}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
