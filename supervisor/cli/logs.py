"""`jobs logs`: what a job printed, byte for byte, also while it runs."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from supervisor.cli import render
from supervisor.cli.main import complain
from supervisor.states import Status

if TYPE_CHECKING:
    from supervisor.manager import JobManager
    from supervisor.output import Chunk

FIRST_LOOK_SECONDS = 0.1
LAST_LOOK_SECONDS = 1.0


def logs(manager: JobManager, options: argparse.Namespace) -> int:
    """Writes the output of one attempt; with --follow of all attempts from the present one, until the job has ended."""
    job = manager.get_job(options.id)
    attempt = options.attempt or max(1, int(job.get("attempts") or 0))
    printer = Printer(as_json=options.json, stream=options.stream, whole=options.tail is None)
    after_seq = -1
    if options.tail is not None:
        there = [each for each in manager.output.read(job["_id"], attempt) if printer.wants(each)]
        after_seq = max((each.seq for each in there), default=-1)
        printer.write_all(attempt, last_lines(there, options.tail))
    if options.follow:
        follow(manager, job["_id"], attempt, printer, after_seq=after_seq, only=options.attempt is not None)
    elif options.tail is None:
        printer.write_all(attempt, manager.output.read(job["_id"], attempt))
    if not printer.wrote and not options.json:
        said = f"has printed nothing (attempt {attempt})" if job.get("attempts") else "has not been started yet"
        complain(f"job {job['_id']} {said}", word="note")
    return 0


def follow(
    manager: JobManager, key: Any, attempt: int, printer: Printer, *, after_seq: int = -1, only: bool = False
) -> None:
    """Writes output as it arrives, attempt by attempt, until the job has ended (`only`: until that attempt has)."""
    pause = FIRST_LOOK_SECONDS
    while True:
        # The status first: what was printed before the end that it tells of is there when it is read.
        job = manager.reports.states([key]).get(key, {})
        before = after_seq
        for chunk in manager.output.read(key, attempt, after_seq=after_seq):
            printer.write(attempt, chunk)
            after_seq = chunk.seq
        status, newest = job.get("status"), int(job.get("attempts") or 0)
        if status not in (Status.PENDING, Status.RUNNING):
            return
        if newest > attempt or (status == Status.PENDING and newest == attempt and only):
            if only:
                return
            attempt, after_seq, pause = attempt + 1, -1, FIRST_LOOK_SECONDS
            continue
        pause = FIRST_LOOK_SECONDS if after_seq > before else min(LAST_LOOK_SECONDS, pause * 1.5)
        time.sleep(pause)


def last_lines(chunks: Iterable[Chunk], count: int) -> Iterator[Chunk]:
    """The chunks that hold the last `count` lines; the first is cut to where they begin."""
    kept: deque[Chunk] = deque()
    lines: deque[int] = deque()
    for chunk in chunks:
        kept.append(chunk)
        lines.append(chunk.data.count(b"\n"))
        while sum(lines) - lines[0] > count:
            kept.popleft()
            lines.popleft()
    if not kept:
        return
    ends_inside_line = not kept[-1].data.endswith(b"\n")
    surplus = sum(lines) + ends_inside_line - count
    first = kept.popleft()
    position = 0
    for _ in range(max(0, surplus)):
        found = first.data.find(b"\n", position)
        if found < 0:
            break
        position = found + 1
    if position < len(first.data):
        yield type(first)(first.seq, first.stream, first.offset + position, first.data[position:])
    yield from kept


class Printer:
    """Writes chunks to stdout: as they are, or as JSON documents, and says where something is missing."""

    def __init__(self, *, as_json: bool, stream: str | None, whole: bool) -> None:
        self.wrote = False
        self._as_json = as_json
        self._stream = stream
        self._whole = whole
        self._ends: dict[tuple[int, str], int] = {}
        self._decoders: dict[tuple[int, str], codecs.IncrementalDecoder] = {}

    def wants(self, chunk: Chunk) -> bool:
        return self._stream is None or chunk.stream == self._stream

    def write_all(self, attempt: int, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.write(attempt, chunk)

    def write(self, attempt: int, chunk: Chunk) -> None:
        if not self.wants(chunk):
            return
        place = (attempt, chunk.stream)
        missing = chunk.offset - self._ends.get(place, 0 if self._whole else chunk.offset)
        self._ends[place] = chunk.offset + len(chunk.data)
        self.wrote = True
        if self._as_json:
            self._write_json(attempt, chunk, missing)
            return
        if missing > 0:
            sys.stdout.buffer.write(f"\n[… {render.byte_size(missing)} not kept …]\n".encode())
        sys.stdout.buffer.write(chunk.data)
        sys.stdout.buffer.flush()

    def _write_json(self, attempt: int, chunk: Chunk, missing: int) -> None:
        place = (attempt, chunk.stream)
        decoder = self._decoders.get(place)
        if decoder is None or missing:
            decoder = self._decoders[place] = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(chunk.data)
        document: dict[str, Any] = {
            "attempt": attempt,
            "stream": chunk.stream,
            "offset": chunk.offset,
            "text": text,
        }
        if missing > 0:
            document["missing_bytes"] = missing
        render.print_json(document)
