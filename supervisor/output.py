"""What is kept of a job's output while it runs: the first and the last half of a limit, whatever the job prints.

Memory is bounded by the limit, however fast and malformed the output. Pure: bytes go in, chunks for the store and
readable tails come out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

CHUNK_BYTES = 65_536
EXACT_CHUNKS = 10_000
"""So many pieces are kept apart wherever the streams alternate; later ones are joined to the last of their stream."""
TAIL_BYTES = 65_536
"""What of each stream the job's own log shows."""
LIVE_TAIL_BYTES = 1_048_576
"""What one flush of a running job sends of output that may be dropped again: a flood must not flood MongoDB."""


@dataclass(slots=True)
class Chunk:
    """A piece of one stream. `seq` counts over both streams in the order of arrival, `offset` within one."""

    seq: int
    stream: str
    offset: int
    data: bytes


class OutputCapture:
    """The output of one attempt, both streams together within `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._head_left = limit_bytes // 2
        self._tail_limit = limit_bytes - self._head_left
        self._unsent_head: list[Chunk] = []
        self._tail: deque[Chunk] = deque()
        self._tail_bytes = 0
        self._sent_tail: set[int] = set()
        self._removed: list[int] = []
        self._seq = 0
        self._offsets = {"stdout": 0, "stderr": 0}
        self._ends = {"stdout": bytearray(), "stderr": bytearray()}

    def feed(self, stream: str, data: bytes) -> None:
        """Takes in what was read from a stream, at most a pipe's worth."""
        end = self._ends[stream]
        end += data
        if len(end) > 2 * TAIL_BYTES:
            del end[:-TAIL_BYTES]
        if self._head_left > 0:
            head, data = data[: self._head_left], data[self._head_left :]
            self._head_left -= len(head)
            self._extend(self._unsent_head, stream, head)
        if data:
            self._extend(self._tail, stream, data)
            self._tail_bytes += len(data)
            self._forget_oldest()

    def _extend(self, chunks: list[Chunk] | deque[Chunk], stream: str, data: bytes) -> None:
        last = self._open_chunk(chunks, stream)
        if last is not None and len(last.data) + len(data) <= CHUNK_BYTES:
            last.data += data
        else:
            chunks.append(Chunk(self._seq, stream, self._offsets[stream], data))
            self._seq += 1
        self._offsets[stream] += len(data)

    def _open_chunk(self, chunks: list[Chunk] | deque[Chunk], stream: str) -> Chunk | None:
        """The chunk that what comes next may be joined to: the newest one, of this stream and not sent yet."""
        back = 1 if self._seq < EXACT_CHUNKS else 2
        for distance in range(1, min(back, len(chunks)) + 1):
            chunk = chunks[-distance]
            if chunk.seq != self._seq - distance or chunk.seq in self._sent_tail:
                return None
            if chunk.stream == stream:
                return chunk
        return None

    def _forget_oldest(self) -> None:
        while self._tail_bytes > self._tail_limit and len(self._tail) > 1:
            oldest = self._tail.popleft()
            self._tail_bytes -= len(oldest.data)
            if oldest.seq in self._sent_tail:
                self._sent_tail.discard(oldest.seq)
                self._removed.append(oldest.seq)

    def take(self, *, final: bool) -> tuple[list[Chunk], list[int]]:
        """What the store does not have yet, and the `seq` of what it should drop. All of it with `final`."""
        chunks, self._unsent_head = self._unsent_head, []
        room = self._tail_bytes if final else LIVE_TAIL_BYTES
        for chunk in self._tail:
            if chunk.seq in self._sent_tail:
                continue
            if room < len(chunk.data):
                break
            room -= len(chunk.data)
            self._sent_tail.add(chunk.seq)
            chunks.append(chunk)
        removed, self._removed = self._removed, []
        return chunks, removed

    @property
    def has_news(self) -> bool:
        """Whether the store lacks something."""
        return bool(self._unsent_head) or len(self._tail) > len(self._sent_tail)

    def total_bytes(self, stream: str) -> int:
        return self._offsets[stream]

    def tail(self, stream: str) -> str:
        """The last 64 KB of a stream as text: what is not UTF-8 is replaced, progress bars show their last state."""
        end = bytes(self._ends[stream][-TAIL_BYTES:])
        if self._offsets[stream] > len(end):
            while end and 0x80 <= end[0] < 0xC0:  # the cut went through a character
                end = end[1:]
        lines = end.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
        text = "\n".join(line[line.rfind("\r", 0, max(0, len(line) - 1)) + 1 :] for line in lines)
        return text.encode()[-TAIL_BYTES:].decode("utf-8", "ignore")  # each replacement takes three bytes

    def last_line(self, stream: str) -> str:
        """The last line of a stream that is not empty, cut to 300 characters."""
        lines = [line.strip() for line in self.tail(stream)[-4000:].splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def blocks(self) -> list[str]:
        """What the job's log says of the output."""
        found = []
        for stream in ("stdout", "stderr"):
            kept = min(self._offsets[stream], TAIL_BYTES)
            cut = f" (last {kept} of {self._offsets[stream]} bytes)" if kept < self._offsets[stream] else ""
            found.append(f"--- {stream.upper()} ---{cut}\n{self.tail(stream)}")
        return found
