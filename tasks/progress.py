"""Reports its progress while it works: follow it with `python -m supervisor jobs logs -f ID`.

    python progress.py [--steps N] [--seconds S] [--bar]

Prints a line for each step, or with --bar one line that is drawn again and again.
"""

import argparse
import time

WIDTH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description="Reports its progress.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="in all (default 10)")
    parser.add_argument("--bar", action="store_true", help="a bar in one line instead of a line for each step")
    options = parser.parse_args()

    for step in range(1, options.steps + 1):
        time.sleep(options.seconds / options.steps)
        percent = 100 * step // options.steps
        if options.bar:
            done = WIDTH * step // options.steps
            print(f"\r[{'#' * done}{'.' * (WIDTH - done)}] {percent:3d} %", end="", flush=True)
        else:
            print(f"step {step} of {options.steps}, {percent} %", flush=True)
    print("\ndone" if options.bar else "done")


if __name__ == "__main__":
    main()
