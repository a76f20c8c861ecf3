"""A child that is forked ahead of time, while its runner is idle: the next job starts without waiting for the fork.

It waits on a channel for what it is to run, and becomes the job when that comes. While a job runs there is no spare, so
every descendant of the runner is the job. When the runner dies, the channel closes and the kernel kills the spare.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from supervisor.execution import child
from supervisor.execution.child import Launch
from supervisor.messages import Become, Channel, ChannelClosed
from supervisor.processes import die_with_parent


@dataclass(slots=True)
class Spare:
    """A waiting child, seen from its runner."""

    pid: int
    _channel: Channel

    def rehearse(self, launch: Launch) -> None:
        """Has it take in what it is to run, and forget it. After a fork the first write to each page copies that page,
        on both sides: those that the next start writes to are copied now.
        """
        self._send(launch, [])

    def start(self, launch: Launch, stdout: int, stderr: int) -> bool:
        """Hands the job over; False when the spare cannot take it."""
        if not self._send(launch, [stdout, stderr]):
            return False
        self._channel.close()
        return True

    def dismiss(self) -> None:
        """It ends by itself; its end must be collected."""
        self._channel.close()

    def _send(self, launch: Launch, descriptors: list[int]) -> bool:
        try:
            self._channel.send(Become(launch.as_values()), descriptors)
            return True
        except (ChannelClosed, OSError):
            return False


@dataclass(slots=True)
class Orders:
    """What a spare has been told to become."""

    launch: Launch
    descriptors: list[int]
    """Standard output and error; none in a rehearsal."""


def fork_spare() -> Spare | Orders:
    """Returns twice: at once in the runner, and in the spare when it is needed."""
    ours, theirs = Channel.pair()
    runner_pid = os.getpid()
    pid = os.fork()
    if pid != 0:
        theirs.close()
        return Spare(pid, ours)
    die_with_parent(runner_pid, signal.SIGKILL)
    ours.close()
    os.setsid()  # now: whoever gets a session waits for its next turn, which takes 0.8 ms while others are busy
    child.warm_up()
    try:
        return _await_orders(theirs)
    except (ChannelClosed, OSError):
        os._exit(0)


def _await_orders(runner: Channel) -> Orders:
    while True:
        message, descriptors = runner.receive()
        assert isinstance(message, Become)
        orders = Orders(Launch.from_values(message.launch), descriptors)
        if orders.descriptors:
            runner.close()  # freed unclosed, it would give a ResourceWarning, which nobody sees and takes 0.2 ms
            return orders
