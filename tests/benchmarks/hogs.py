"""Jobs that take memory; run by the supervisor, so it stands alone.

hogs.py timed RECORD LIMIT_MB       at full speed when told to, with the time of every chunk in RECORD
hogs.py steady MB SECONDS           takes exactly so much, stays there and trembles, and ends well
hogs.py hold MB                     takes so much and stays until it is ended
hogs.py SHAPE MB                    grows to so much in the shape of that name
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NoReturn

MB = 1 << 20
CHUNK = MB // 4
RECORD_BYTES = 1 << 16
PACE_SECONDS_PER_MB = 1 / 400
"""How fast the shapes grow that are plotted, but for the one at full speed."""

# RECORD: the job's process id, "go", the number of chunks taken, and then the time of each in nanoseconds.
PID, GO, TAKEN, TIMES = 0, 1, 2, 3


def take(memory: mmap.mmap, megabytes: float, *, pace: float = PACE_SECONDS_PER_MB) -> None:
    block = bytes([1]) * CHUNK
    for offset in range(0, int(megabytes * MB), CHUNK):
        memory[offset : offset + CHUNK] = block
        time.sleep(pace / 4)


def private(megabytes: float) -> mmap.mmap:
    return mmap.mmap(-1, int(megabytes * MB) + CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def take_and_stay(megabytes: float, *, pace: float = PACE_SECONDS_PER_MB) -> NoReturn:
    memory = private(megabytes)
    take(memory, megabytes, pace=pace)
    while True:
        memory[0] = 1  # it is still needed
        signal.pause()


def stay() -> NoReturn:
    while True:
        signal.pause()


def timed(record_path: str, limit_mb: str) -> None:
    with open(record_path, "r+b") as file:
        record = memoryview(mmap.mmap(file.fileno(), RECORD_BYTES)).cast("q")
    memory = private(2 * int(limit_mb))
    block = bytes([1]) * CHUNK
    clock, monotonic = time.clock_gettime_ns, time.CLOCK_MONOTONIC
    record[PID] = os.getpid()
    while not record[GO]:
        time.sleep(0.001)
    for number in range(2 * int(limit_mb) * MB // CHUNK):
        memory[number * CHUNK : (number + 1) * CHUNK] = block
        record[TIMES + number] = clock(monotonic)
        record[TAKEN] = number + 1
    sys.exit("nobody stopped it")


def charged_mb() -> float:
    """What the supervisor charges this process, by its own reckoning."""
    from supervisor.memory.usage import tree_usage

    return tree_usage(os.getppid(), pids=[os.getpid()])[os.getpid()].charged / MB


def steady(megabytes: str, seconds: str) -> None:
    target = float(megabytes)
    memory = private(target)
    mine = charged_mb()
    take(memory, target - mine, pace=0)
    reached = charged_mb()
    print(f"{mine:.1f} MB of its own, then {reached:.1f} MB of {target:.1f}")
    if abs(reached - target) > target / 50:
        sys.exit("it did not come where it was to stay")
    ends = time.monotonic() + float(seconds)
    while time.monotonic() < ends:
        trembling = bytearray(CHUNK)
        trembling[::4096] = bytes(CHUNK // 4096)
        time.sleep(0.005)
        del trembling
        time.sleep(0.005)


def hold(megabytes: str) -> None:
    take_and_stay(float(megabytes), pace=0)


# -- the shapes -------------------------------------------------------------------------------------------------------


def full_speed(megabytes: int) -> None:
    take_and_stay(megabytes, pace=0)


def fifty_children(megabytes: int) -> None:
    for _ in range(50):
        if os.fork() == 0:
            take_and_stay(megabytes / 50, pace=PACE_SECONDS_PER_MB * 50)
    stay()


def daemonized_grandchild(megabytes: int) -> None:
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            take_and_stay(megabytes)
        os._exit(0)
    os.waitpid(middle, 0)
    stay()


def anonymous_mapping(megabytes: int) -> None:
    take_and_stay(megabytes)


def shared_memory(megabytes: int) -> None:
    """Shared by four processes: each page counts once."""
    memory = mmap.mmap(-1, megabytes * MB + CHUNK, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    for _ in range(3):
        if os.fork() == 0:
            while True:
                memory[::4096]  # maps the same pages
                time.sleep(0.01)
    take(memory, megabytes)
    stay()


def fork_bomb(megabytes: int) -> None:
    """Every process forks again and again and takes 1 MB, until so many forks were made."""
    reader, writer = os.pipe()
    os.write(writer, b"." * megabytes)
    os.set_blocking(reader, False)
    taken = []
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 1):
            os.fork()
            taken.append(private(1))
            take(taken[-1], 1)
    stay()


SHAPES: dict[str, Callable[[int], None]] = {
    "one process at full speed": full_speed,
    "50 children of 2 % each": fifty_children,
    "a daemonized grandchild": daemonized_grandchild,
    "an anonymous mapping": anonymous_mapping,
    "memory shared by four processes": shared_memory,
    "a fork bomb": fork_bomb,
}


OTHERS: dict[str, Callable[..., None]] = {"timed": timed, "steady": steady, "hold": hold}


def record_of(data: bytes) -> tuple[int, list[int]]:
    """Process id and times of the chunks in nanoseconds, from the bytes of a RECORD."""
    words = struct.unpack(f"{len(data) // 8}q", data)
    return words[PID], list(words[TIMES : TIMES + words[TAKEN]])


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name in SHAPES:
        SHAPES[name](int(arguments[0]))
    else:
        OTHERS[name](*arguments)
