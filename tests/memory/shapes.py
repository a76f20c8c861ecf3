"""Jobs that use memory in every shape. `python shapes.py NAME ARGUMENTS` runs one; forked ones are called by name.

A job that has taken what it wanted says so with a byte on its standard output and stays until it is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import shared_memory

MB = 1 << 20
PAGE = mmap.PAGESIZE


def hold() -> None:
    """Says that everything is taken, and stays."""
    os.write(1, b".")
    while True:
        signal.pause()


def touch(memory: mmap.mmap | memoryview, start: int, stop: int) -> None:
    for offset in range(start, stop, PAGE):
        memory[offset] = 1


def filled(mb: int) -> bytearray:
    memory = bytearray(mb * MB)
    touch(memoryview(memory), 0, mb * MB)
    return memory


def private_mb() -> float:
    """What this process has for itself alone."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        kilobytes = [int(line.split()[1]) for line in file if line.startswith("Private_Dirty")]
    return kilobytes[0] / 1024


def grow(mb: int) -> None:
    """As fast as it can."""
    taken = [bytearray(MB) for _ in range(mb)]
    hold()
    del taken


def grow_to(mb: int) -> None:
    """Until this process has exactly so much for itself, however much it began with; then trembles a little."""
    taken: list[bytearray] = []
    while private_mb() < mb - 1:
        taken.append(bytearray(MB // 4))
    os.write(1, b".")
    while True:
        bytearray(MB // 4)


def anonymous_mapping(mb: int) -> None:
    memory = mmap.mmap(-1, mb * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touch(memory, 0, mb * MB)
    hold()


def shared_mapping(mb: int) -> None:
    memory = mmap.mmap(-1, mb * MB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    touch(memory, 0, mb * MB)
    hold()


def shared_mapping_of_many(mb: int, children: int) -> None:
    """All of them touch all of it: still one memory."""
    memory = mmap.mmap(-1, mb * MB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    each_of(children, lambda: touch(memory, 0, mb * MB))
    hold()


def shared_memory_object(mb: int) -> None:
    """Of the multiprocessing package: a mapped file in /dev/shm. Unlinked while in use, so that nothing is left."""
    memory = shared_memory.SharedMemory(create=True, size=mb * MB)
    memory.unlink()
    touch(memory.buf, 0, mb * MB)
    hold()


def each_of(children: int, work: Callable[[], object]) -> None:
    """Forks children that do some work and stay; returns when all have done it."""
    reader, writer = os.pipe()
    for _ in range(children):
        if os.fork() == 0:
            kept = work()
            os.write(writer, b".")
            while True:
                signal.pause()
            del kept
    for _ in range(children):
        os.read(reader, 1)


def children(count: int, mb_each: int) -> None:
    each_of(count, lambda: filled(mb_each))
    hold()


def children_of_a_thread(count: int) -> None:
    """And one of the main thread."""

    def start() -> None:
        for _ in range(count):
            subprocess.Popen(["/bin/sleep", "600"])
        started.set()
        threading.Event().wait()

    started = threading.Event()
    threading.Thread(target=start, daemon=True).start()
    started.wait()
    subprocess.Popen(["/bin/sleep", "600"])
    hold()


def daemonized_grandchild(mb: int) -> None:
    """Double fork and a session of its own; the one between has ended."""
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            grow(mb)
        os._exit(0)
    os.waitpid(middle, 0)
    while True:
        signal.pause()


def bomb(processes: int) -> None:
    """Every process forks again and takes 1 MB, until so many forks were made: the pipe holds what is left."""
    reader, writer = os.pipe()
    os.write(writer, b"." * processes)
    os.set_blocking(reader, False)
    taken = []
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 1):
            os.fork()
            taken.append(filled(1))
    hold()


def forks_that_share(mb: int, count: int) -> None:
    taken = filled(mb)
    each_of(count, lambda: taken[0])
    hold()


def forks_that_map(mb: int, count: int) -> None:
    """Shared memory that more and more processes map, a page at a time: none of it is new."""
    shared = mmap.mmap(-1, mb * MB)  # shared and anonymous
    touch(memoryview(shared), 0, mb * MB)
    view = memoryview(shared)

    def read() -> None:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                for offset in range(0, mb * MB, PAGE):
                    view[offset]
                os._exit(0)
            os.waitpid(child, 0)

    each_of(count, read)
    hold()


def forks_that_write(mb: int, count: int) -> None:
    """They begin by sharing and end with a copy each."""
    taken = filled(mb)
    each_of(count, lambda: touch(memoryview(taken), 0, mb * MB))
    hold()


def mapped_file(path: str, write: str) -> None:
    """Every page of the file is in this process's memory, and the kernel may drop it at any time."""
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        for offset in range(0, len(memory), PAGE):
            if write == "write":
                memory[offset] = 1
            else:
                assert memory[offset] == 0
        hold()


def starts_programs(mb: int, count: int) -> None:
    """subprocess starts each with vfork: for a moment the child looks as large as its parent."""
    taken = filled(mb)
    for _ in range(count):
        subprocess.run(["/bin/true"], check=True)
    hold()
    del taken


def inherits(mb_written: int) -> None:
    """Has what its runner had loaded, and writes to so much of it."""
    touch(memoryview(PRELOADED), 0, mb_written * MB)
    hold()


PRELOADED = bytearray()
"""What the warm interpreter has loaded; see watch.py."""


def run(name: str, arguments: list[str]) -> None:
    globals()[name](*(int(text) if text.isdigit() else text for text in arguments))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
