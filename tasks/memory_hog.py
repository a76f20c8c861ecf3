"""Allocates memory at a steady rate and holds it: see how a job is ended at its `required_memory`.

    python memory_hog.py [--mb N] [--rate MB_PER_SECOND] [--hold SECONDS] [--shape bytearray|mmap]

Without --rate as fast as it can. Every page is touched, so that it counts.
"""

import argparse
import mmap
import time

STEP_MB = 4
PAGE = 4096


def allocate(megabytes: int, shape: str) -> "bytearray | mmap.mmap":
    size = megabytes * 2**20
    block = bytearray(size) if shape == "bytearray" else mmap.mmap(-1, size)
    for position in range(0, size, PAGE):
        block[position] = 1
    return block


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocates memory and holds it.")
    parser.add_argument("--mb", type=int, default=256, help="in all (default 256)")
    parser.add_argument("--rate", type=float, help="MB per second (default: as fast as it can)")
    parser.add_argument("--hold", type=float, default=5.0, help="seconds to hold it (default 5)")
    parser.add_argument("--shape", choices=["bytearray", "mmap"], default="bytearray")
    options = parser.parse_args()

    blocks = []
    taken = 0
    began = time.monotonic()
    while taken < options.mb:
        step = min(STEP_MB, options.mb - taken)
        blocks.append(allocate(step, options.shape))
        taken += step
        print(f"{taken} MB", flush=True)
        if options.rate:
            time.sleep(max(0.0, began + taken / options.rate - time.monotonic()))
    time.sleep(options.hold)
    print(f"held {taken} MB for {options.hold:g} s")


if __name__ == "__main__":
    main()
