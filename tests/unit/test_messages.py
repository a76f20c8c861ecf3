"""The channel between processes: borders, descriptors, large messages, and both kinds of silence."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor import messages
from supervisor.messages import (
    Beat,
    Channel,
    ChannelClosed,
    ChannelFull,
    ForkRunner,
    Message,
    Ping,
    Pong,
    Renewed,
    RunningJob,
    StoreState,
    decode,
    encode,
)

SAMPLES: dict[Any, Any] = {Any: "any", int: 7, bytes: b"\0\xff", float: 0.25, str: "ü\0$", bool: True, type(None): None}


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


def sample(kind: Any) -> Any:
    """A value of a type, as JSON gives it back."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, vars(messages))
        return kind(**{field.name: sample(hints[field.name]) for field in dataclasses.fields(kind)})
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [sample(arguments[0])]
    if typing.get_origin(kind) is tuple:
        return [sample(argument) for argument in arguments]
    if typing.get_origin(kind) is dict:
        return {"key": sample(arguments[1])}
    return SAMPLES[kind] if kind in SAMPLES else sample(arguments[0])


@pytest.mark.parametrize("kind", typing.get_args(Message), ids=lambda kind: kind.__name__)
def test_every_message_arrives_as_it_was_sent(kind: type[Any]) -> None:
    message = sample(kind)
    assert decode(encode(message)) == message


def test_messages_keep_their_order_and_their_borders(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    sent = [Renewed([str(n)] * n, float(n)) for n in range(50)]
    for message in sent:
        left.send(message)
    assert [right.receive()[0] for _ in sent] == sent


@pytest.mark.parametrize("size", [1, 59_000, 61_000, 3_000_000])
def test_any_size_arrives_with_its_descriptors(pair: tuple[Channel, Channel], size: int) -> None:
    left, right = pair
    reader, writer = os.pipe()
    left.send(StoreState(False, "x" * size), [writer])
    os.close(writer)
    message, (descriptor,) = right.receive()
    assert message == StoreState(False, "x" * size)
    os.write(descriptor, b"here")
    os.close(descriptor)
    assert os.read(reader, 10) == b"here"
    os.close(reader)


def test_nested_messages() -> None:
    job = RunningJob("t", "id", 1, 2, 3, 4, 5.0)
    beat = sample(Beat)
    beat = dataclasses.replace(beat, running=[job, job])
    assert decode(encode(beat)) == beat


def test_the_end_is_seen_behind_the_last_message(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.send(Ping())
    left.end()
    assert right.receive()[0] == Ping()
    with pytest.raises(ChannelClosed):
        right.receive()
    right.send(Pong())
    assert left.receive()[0] == Pong(), "the other direction is still open"


def test_nobody_reads_any_more(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.close()
    with pytest.raises(ChannelClosed):
        left.send(Ping())


@pytest.mark.parametrize("descriptors", [[], [0]])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_side_that_does_not_read_stops_nobody(
    pair: tuple[Channel, Channel], descriptors: list[int], size: int
) -> None:
    left, right = pair
    message = StoreState(True, "x" * size)
    sent = 0
    with pytest.raises(ChannelFull):
        while True:
            left.send(message, descriptors, wait=False)
            sent += 1
    for _ in range(sent):
        assert right.has_message()
        received, passed = right.receive()
        assert received == message
        for descriptor in passed:
            os.close(descriptor)
    assert not right.has_message()


def test_a_message_that_is_larger_than_the_socket_needs_no_reader(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.send(StoreState(True, "x" * 10_000_000), wait=False)
    assert right.receive()[0] == StoreState(True, "x" * 10_000_000)


def test_fork_runner_carries_two_sockets(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    ours, theirs = Channel.pair()
    left.send(ForkRunner(3), [theirs.fileno()])
    theirs.close()
    message, (descriptor,) = right.receive()
    assert message == ForkRunner(3)
    passed = Channel.from_descriptor(descriptor)
    passed.send(Ping())
    assert ours.receive()[0] == Ping()
    passed.close()
    ours.close()
