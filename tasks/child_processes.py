"""Splits its work over child processes; their memory counts towards the job, and they are ended with it.

    python child_processes.py [--children N] [--mb MB_EACH] [--seconds S] [--leave-one]

--leave-one: ends while one child still sleeps in a session of its own; the supervisor ends that child, too.
"""

import argparse
import subprocess
import sys

CHILD = """
import os, sys, time
megabytes, seconds, number = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
block = b"x" * (megabytes * 2**20)
print(f"child {number}: process {os.getpid()} holds {megabytes} MB", flush=True)
time.sleep(seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Works in child processes.")
    parser.add_argument("--children", type=int, default=3)
    parser.add_argument("--mb", type=int, default=8, help="that each child holds (default 8)")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--leave-one", action="store_true")
    options = parser.parse_args()

    def start(number: int, seconds: float, detached: bool = False) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", CHILD, str(options.mb), str(seconds), str(number)]
        return subprocess.Popen(command, start_new_session=detached)

    children = [start(number, options.seconds) for number in range(options.children)]
    if options.leave_one:
        print(f"left behind: {start(options.children, 3600, detached=True).pid}", flush=True)
    failed = sum(child.wait() != 0 for child in children)
    if failed:
        sys.exit(f"{failed} of {len(children)} children failed")
    print(f"{len(children)} children have ended")


if __name__ == "__main__":
    main()
