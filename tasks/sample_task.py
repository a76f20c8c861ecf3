"""A sample job: prints its arguments, works for 3 to 8 seconds, and fails one time in five.

    python sample_task.py [--seconds S] [--fail-rate 0..1] [ANYTHING...]

The same can be set by the variables SAMPLE_SECONDS and SAMPLE_FAIL_RATE.
"""

import argparse
import os
import random
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description="A sample job.")
    parser.add_argument("--seconds", type=float, default=os.environ.get("SAMPLE_SECONDS"), help="default: 3 to 8")
    parser.add_argument("--fail-rate", type=float, default=os.environ.get("SAMPLE_FAIL_RATE", "0.2"))
    options, arguments = parser.parse_known_args()
    seconds = random.uniform(3, 8) if options.seconds is None else options.seconds

    print(f"arguments: {arguments}", flush=True)
    print(
        f"job {os.environ.get('JOB_ID', '-')}, attempt {os.environ.get('JOB_ATTEMPT', '-')}: {seconds:.1f} s",
        flush=True,
    )
    time.sleep(seconds)
    if random.random() < options.fail_rate:
        sys.exit("this attempt was unlucky")
    print("done")


if __name__ == "__main__":
    main()
