"""What is kept of a job's output: the first and the last half, in order, and readable tails."""

from __future__ import annotations

import pytest

from supervisor.output import TAIL_BYTES, Chunk, OutputCapture

KB = 1024


def feed_lines(capture: OutputCapture, count: int, stream: str = "stdout") -> bytes:
    data = b"".join(b"%07d\n" % n for n in range(count))
    for start in range(0, len(data), 1000):
        capture.feed(stream, data[start : start + 1000])
    return data


def stored(capture: OutputCapture, live: int = 0) -> dict[int, Chunk]:
    """What a store has that was given everything it was told to keep, and to drop."""
    chunks, removed = capture.take(final=True)
    assert not removed
    return {chunk.seq: chunk for chunk in chunks}


def text_of(chunks: dict[int, Chunk], stream: str = "stdout") -> bytes:
    return b"".join(chunks[seq].data for seq in sorted(chunks) if chunks[seq].stream == stream)


def test_little_output_is_kept_whole() -> None:
    capture = OutputCapture(64 * KB)
    data = feed_lines(capture, 100)
    assert text_of(stored(capture)) == data
    assert capture.tail("stdout").encode() == data


def test_of_much_output_the_first_and_the_last_half_are_kept() -> None:
    capture = OutputCapture(256 * KB)
    data = feed_lines(capture, 200_000)
    kept = text_of(stored(capture))
    half = 128 * KB
    assert kept[:half] == data[:half]
    tail = kept[half:]
    assert data.endswith(tail)
    assert half - 64 * KB <= len(tail) <= half
    assert capture.total_bytes("stdout") == len(data)


def test_offsets_show_where_something_is_missing() -> None:
    capture = OutputCapture(256 * KB)
    data = feed_lines(capture, 200_000)
    for chunk in stored(capture).values():
        assert data[chunk.offset : chunk.offset + len(chunk.data)] == chunk.data


def test_a_store_that_follows_ends_with_the_same() -> None:
    followed, asked_once = OutputCapture(200 * KB), OutputCapture(200 * KB)
    store: dict[int, Chunk] = {}
    for n in range(500):
        data = b"%04d" % n * 1000
        for capture in (followed, asked_once):
            capture.feed("stdout" if n % 3 else "stderr", data)
        if n % 7 == 0:
            keep(store, followed, final=False)
    keep(store, followed, final=True)
    for stream in ("stdout", "stderr"):
        followed_text, whole = text_of(store, stream), text_of(stored(asked_once), stream)
        assert followed_text.endswith(whole[-40 * KB :])
        assert followed_text.startswith(whole[: 20 * KB])
    assert sum(len(chunk.data) for chunk in store.values()) <= 200 * KB + 64 * KB


def keep(store: dict[int, Chunk], capture: OutputCapture, *, final: bool) -> None:
    chunks, removed = capture.take(final=final)
    for chunk in chunks:
        assert chunk.seq not in store, "a chunk that was sent has changed"
        store[chunk.seq] = Chunk(chunk.seq, chunk.stream, chunk.offset, bytes(chunk.data))
    for seq in removed:
        store.pop(seq, None)


def test_nothing_is_told_twice() -> None:
    capture = OutputCapture(64 * KB)
    capture.feed("stdout", b"a")
    assert capture.has_news
    assert len(capture.take(final=False)[0]) == 1
    assert not capture.has_news
    assert capture.take(final=True) == ([], [])


@pytest.mark.parametrize(
    ("data", "tail"),
    [
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"a\0b", "a\0b"),
        (b"10 %\r20 %\r30 %\n", "30 %\n"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        ("é".encode() * 40_000, "é" * (TAIL_BYTES // 2)),
        (b"x" + "é".encode() * 40_000, "é" * (TAIL_BYTES // 2)),
    ],
)
def test_the_tail_is_text(data: bytes, tail: str) -> None:
    capture = OutputCapture(1024 * KB)
    for start in range(0, len(data), 4000):
        capture.feed("stdout", data[start : start + 4000])
    assert capture.tail("stdout") == tail


def test_the_last_line_is_the_last_that_says_something() -> None:
    capture = OutputCapture(64 * KB)
    capture.feed("stderr", b"Traceback\nValueError: no\n\n   \n")
    assert capture.last_line("stderr") == "ValueError: no"
    assert capture.last_line("stdout") == ""


def test_alternating_streams_stay_bounded() -> None:
    capture = OutputCapture(64 * KB)
    for n in range(100_000):
        capture.feed("stdout" if n % 2 else "stderr", b"x")
    chunks = stored(capture)
    assert len(chunks) < 66_000
    assert sum(len(chunk.data) for chunk in chunks.values()) <= 64 * KB + 1


def test_a_tail_that_is_no_utf_8_is_not_longer_than_another() -> None:
    capture = OutputCapture(1024 * KB)
    capture.feed("stdout", b"\xff" * 100 * KB + b"end\n")
    tail = capture.tail("stdout")
    assert len(tail.encode()) <= TAIL_BYTES
    assert tail.endswith("\ufffdend\n")


def test_both_streams_have_a_block_even_if_nothing_was_said() -> None:
    capture = OutputCapture(64 * KB)
    capture.feed("stdout", b"text\n")
    assert capture.blocks() == ["--- STDOUT ---\ntext\n", "--- STDERR ---\n"]
